//! What the daemon says on the wire: types, error codes, the client and the server's routes.
