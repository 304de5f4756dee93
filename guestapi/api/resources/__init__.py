"""One module an endpoint. A resource is handed an instance that its caller may ask about, and says what it is."""
