//! What a guest boots from: a kernel, an initramfs and a root image.
//!
//! All three are built here and nowhere else, from things the operator already trusts: the distribution's signed
//! packages, or files of their own. Nothing is installed on the host, no loop device is used, and nothing appears
//! under its final name before it is complete and on disk.
//!
//! ```text
//!   kernel::fetch ─┐                              rootfs::build
//!   kernel::import ┴─> kernels/<digest>/            debian │ tar │ dir │ image
//!                        │  + agent                        │ a directory tree, or an image
//!                        └─> initramfs::ensure             └─> ext4 image in staging, named by its digest
//! ```
//!
//! Every function that does work here **blocks** for seconds to minutes: call it on a thread that may block
//! (`tokio::task::spawn_blocking`). Work happens in a directory under [`Places::staging`] that is removed on every way
//! out; external tools are killed when the calling thread dies, so what [`sweep`] finds at start is always dead.
//!
//! Not here: templates (which name and keep root images), and anything a guest writes.

mod apt;
mod archive;
pub(crate) mod command;
mod digest;
mod error;
#[cfg(feature = "fixture")]
pub mod fixture;
pub mod initramfs;
pub mod kernel;
mod kernels;
mod modules;
mod progress;
pub mod rootfs;
mod staging;
pub mod vmlinux;

pub use digest::digest_of_file;
pub use error::ImageError;
use error::Io;
pub use kernels::KernelStore;
pub use progress::{Progress, Silent, Stage};
pub use staging::{Places, sweep};
