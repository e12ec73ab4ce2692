//! The box once more, by Landlock: what a VMM may open, make and reach is a list.
//!
//! Mounts and the box's uid keep a VMM from what is not its own. The list stands where one of them is mistaken, and says what
//! they cannot: where the VMM may write, it makes files, directories and sockets, but no links, pipes or devices for root to
//! stumble over; it uses no TCP, since guests have a tap; and it signals nobody.
//!
//! A kernel enforces what it knows of it: version 1 is Linux 5.13, and 6, which is all of it, Linux 6.12. `icebox doctor` says
//! which one there is.

use std::error::Error;
use std::io;

use ::landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset,
    RulesetAttr as _, RulesetCreatedAttr as _, Scope, make_bitflags,
};

use super::world::COMMON_DEVICES;
use super::{BoxSpec, sys};

/// The newest version that is made use of.
pub const LANDLOCK_NEWEST: u32 = 6;
const NEWEST: ABI = ABI::V6;

/// Which version of Landlock this kernel has.
///
/// # Errors
/// It has none, or none that is switched on.
pub fn landlock_version() -> io::Result<u32> {
    sys::landlock_version()
}

/// Restricts the calling process, which has one thread and is in its box already, to what is in the box.
pub(super) fn restrict(spec: &BoxSpec) -> Result<(), Box<dyn Error + Send + Sync>> {
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    let writable = spec.binds.iter().filter(|bind| bind.writable);
    let writable = writable.map(|bind| (&*bind.target, write()));
    let common = COMMON_DEVICES
        .iter()
        .map(|path| (path.as_ref(), use_device()));
    let devices = spec
        .devices
        .iter()
        .map(|node| (&*node.target, use_device()));
    let mut ruleset = ruleset.add_rule(PathBeneath::new(
        PathFd::new("/")?,
        AccessFs::from_read(NEWEST),
    ))?;
    for (path, access) in writable.chain(common).chain(devices) {
        let access = if path.is_dir() {
            access
        } else {
            access & AccessFs::from_file(NEWEST)
        };
        ruleset = ruleset.add_rule(PathBeneath::new(PathFd::new(path)?, access))?;
    }
    ruleset.restrict_self()?;
    Ok(())
}

fn write() -> BitFlags<AccessFs> {
    make_bitflags!(AccessFs::{
        ReadFile | ReadDir | WriteFile | Truncate | MakeReg | MakeDir | MakeSock | RemoveFile | RemoveDir
    })
}

fn use_device() -> BitFlags<AccessFs> {
    make_bitflags!(AccessFs::{ReadFile | WriteFile | IoctlDev})
}
