"""Who may do what: shipped groups, one choke point, API tokens. Imports no other app."""
