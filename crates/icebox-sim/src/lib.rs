//! The engine's driver traits in memory, and faults by index around any implementation of them.
