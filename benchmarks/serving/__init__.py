"""What steers cost as the users of a server see it: servers, clients, offline runs, rounds."""
