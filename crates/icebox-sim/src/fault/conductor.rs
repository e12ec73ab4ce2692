//! A daemon's steps, conducted from outside: a test asks that the fifth step of a pause is held, and then kills the daemon,
//! or the VMM, or whatever else it likes, at exactly that moment.
//!
//! ```text
//!   step ── connect ──► conductor
//!           "before store.commit"  ──►          ◄── "go on" · "fail" · "full" · nothing: it waits
//!           (the effect)
//!           "after store.commit"   ──►          ◄── the same
//! ```
//! Each step has a connection of its own, so steps that happen at once need no order. Where nobody listens, or who did
//! has gone, every step goes on. The conductor counts and decides; nothing is armed here.

use std::path::PathBuf;

use icebox_engine::host::HostError;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

use super::injector::{broken, full};

pub(super) struct Conductor(PathBuf);

impl Conductor {
    /// One that listens, or will or does not, on this socket.
    pub(super) fn at(socket: PathBuf) -> Self {
        Self(socket)
    }

    pub(super) async fn around<T>(
        &self,
        step: &'static str,
        effect: impl Future<Output = Result<T, HostError>> + Send,
    ) -> Result<T, HostError> {
        let Ok(connection) = UnixStream::connect(&self.0).await else {
            return effect.await;
        };
        let mut connection = BufReader::new(connection);
        ask(&mut connection, "before", step).await?;
        let done = effect.await?;
        ask(&mut connection, "after", step).await?;
        Ok(done)
    }
}

/// What is to become of a step on this side of its effect.
async fn ask(
    connection: &mut BufReader<UnixStream>,
    side: &str,
    step: &'static str,
) -> Result<(), HostError> {
    let mut answer = String::new();
    let asked = async {
        let question = format!("{side} {step}\n");
        connection.get_mut().write_all(question.as_bytes()).await?;
        connection.read_line(&mut answer).await
    };
    // A conductor that has gone does not mind.
    asked.await.unwrap_or_default();
    match answer.trim_end() {
        "fail" => Err(broken(step)),
        "full" => Err(full(step)),
        _ => Ok(()),
    }
}
