//! This machine as the ground that sandboxes run on.

use super::Ground;
use crate::failure::Failure;

pub(super) fn ground() -> Result<Ground, Failure> {
    Err(Failure::new("this build has no VMM driver").hint("try the interfaces out with --sim"))
}
