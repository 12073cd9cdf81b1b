"""The endpoints, a router for each concern."""
