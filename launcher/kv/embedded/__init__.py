"""The store that the first node hosts: a server, its clients, and how the two talk."""
