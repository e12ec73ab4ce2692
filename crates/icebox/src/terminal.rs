//! This process's terminal.

use std::io::{IsTerminal as _, stdin};

use icebox_agent_api::client::TerminalSize;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// The terminal's size, if stdin is one.
pub(crate) fn size() -> Option<TerminalSize> {
    let size = tcgetwinsize(stdin()).ok()?;
    Some(TerminalSize {
        columns: size.ws_col,
        rows: size.ws_row,
    })
}

/// Passes every key through unchanged until it is dropped.
pub(crate) struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Enters raw mode. `None` if stdin is no terminal: then there is nothing to change.
    pub(crate) fn enter() -> Option<Self> {
        if !stdin().is_terminal() {
            return None;
        }
        let before = tcgetattr(stdin()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Drain, &raw).ok()?;
        Some(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // If it fails the terminal is gone, and its settings with it.
        tcsetattr(stdin(), OptionalActions::Drain, &self.before).ok();
    }
}
