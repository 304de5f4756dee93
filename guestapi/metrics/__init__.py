"""What is counted of the service, how workers hand it over, and how it is told to a monitoring system."""
