"""A fleet: the instances of many hosts in one PostgreSQL database. `engine` alone imports psycopg."""
