//! The routes, the proxy and the client against a daemon that is only a test's script.

mod access;
mod connections;
mod http2;
mod proxy;
mod routes;
mod script;
mod served;
