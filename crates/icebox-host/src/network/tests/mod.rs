//! Slots on a real kernel. Every test has a network of its own to act as the host's: a namespace that nothing connects
//! to this machine's, so rules, routes and `ip_forward` of the machine are never touched and tests run in parallel.

mod faults;
mod lab;
mod life;
mod traffic;
