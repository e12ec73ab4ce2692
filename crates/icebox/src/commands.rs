//! One file per command.

pub(crate) mod completions;
pub(crate) mod create;
pub(crate) mod destroy;
pub(crate) mod doctor;
pub(crate) mod events;
pub(crate) mod flatten;
pub(crate) mod fork;
pub(crate) mod gc;
pub(crate) mod inspect;
pub(crate) mod kernel;
pub(crate) mod list;
pub(crate) mod logs;
pub(crate) mod pause;
pub(crate) mod resume;
pub(crate) mod snapshot;
pub(crate) mod start;
pub(crate) mod stop;
pub(crate) mod template;

mod size;
mod verb;

use std::path::Path;
use std::process::ExitCode;

use icebox_api::client::Client;

use crate::cli::{Cli, Command};
use crate::failure::Failure;
use crate::output::Output;

/// What every client command has at hand.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) output: Output,
}

/// How a command ends.
pub(crate) type Ended = Result<ExitCode, Failure>;

/// Runs the command to its end.
pub(crate) fn run(cli: Cli, output: Output) -> Ended {
    let context = Context {
        client: Client::new(cli.socket),
        output,
    };
    if let Command::Completions(args) = cli.command {
        return completions::run(&args);
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::because("cannot start the async runtime", &error))?;
    runtime.block_on(client(context, cli.command))
}

async fn client(context: Context, command: Command) -> Ended {
    match command {
        Command::Create(args) => create::run(&context, args).await,
        Command::Ls(args) => list::run(&context, &args).await,
        Command::Inspect(args) => inspect::run(&context, &args).await,
        Command::Pause(args) => pause::run(&context, &args).await,
        Command::Resume(args) => resume::run(&context, &args).await,
        Command::Stop(args) => stop::run(&context, &args).await,
        Command::Start(args) => start::run(&context, &args).await,
        Command::Snapshot(args) => snapshot::run(&context, args).await,
        Command::Fork(args) => fork::run(&context, &args).await,
        Command::Flatten(args) => flatten::run(&context, args).await,
        Command::Rm(args) => destroy::run(&context, &args).await,
        Command::Logs(args) => logs::run(&context, &args).await,
        Command::Events(args) => events::run(&context, &args).await,
        Command::Template(command) => template::run(&context, command).await,
        Command::Kernel(command) => kernel::run(&context, command).await,
        Command::Doctor(args) => doctor::run(&context, &args).await,
        Command::Gc(args) => gc::run(&context, &args).await,
        Command::Completions(args) => completions::run(&args),
    }
}

/// A reference as the user typed it. What it may contain is the daemon's to say; nothing at all is refused here,
/// since an empty path segment would name another resource.
pub(crate) fn reference(text: &str) -> Result<String, String> {
    if text.is_empty() {
        Err("a name or an id is needed, and this is empty".to_owned())
    } else {
        Ok(text.to_owned())
    }
}

/// `KEY=VALUE`.
pub(crate) fn key_value(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err("expected KEY=VALUE".to_owned()),
    }
}

/// The daemon has another working directory.
pub(crate) fn absolute(path: &Path) -> Result<String, Failure> {
    let path = std::path::absolute(path)
        .map_err(|error| Failure::because(format!("cannot use path {}", path.display()), &error))?;
    path.into_os_string().into_string().map_err(|path| {
        Failure::new(format!("cannot use path {}", path.display()))
            .hint("a path must be valid UTF-8")
    })
}
