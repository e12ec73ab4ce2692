//! The sandbox: phases, verbs, holds, manifests and the driver traits. No HTTP, no VMM names.
