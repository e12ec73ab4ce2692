//! The engine's driver traits on Linux: VMMs, volumes, network slots, boxes, guests.
