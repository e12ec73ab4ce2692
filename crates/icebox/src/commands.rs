//! One file per command.

pub(crate) mod attach;
pub(crate) mod audit;
pub(crate) mod ca;
pub(crate) mod checkpoint;
pub(crate) mod completions;
pub(crate) mod copy;
pub(crate) mod create;
pub(crate) mod destroy;
pub(crate) mod doctor;
pub(crate) mod drain;
pub(crate) mod events;
pub(crate) mod exec;
pub(crate) mod flatten;
pub(crate) mod fork;
pub(crate) mod gc;
pub(crate) mod history;
pub(crate) mod inspect;
pub(crate) mod kernel;
pub(crate) mod key;
pub(crate) mod list;
pub(crate) mod logs;
pub(crate) mod pause;
pub(crate) mod pool;
pub(crate) mod ps;
pub(crate) mod resume;
pub(crate) mod rollback;
pub(crate) mod shell;
pub(crate) mod snapshot;
pub(crate) mod start;
pub(crate) mod stats;
pub(crate) mod stop;
pub(crate) mod team;
pub(crate) mod template;
pub(crate) mod timeout;
pub(crate) mod vmm;

mod lifetime;
mod process;
mod size;
mod verb;

use std::path::Path;
use std::process::ExitCode;

use icebox_api::client::Client;

use crate::cli::{Cli, ClientCommand, Command, DEFAULT_SOCKET};
use crate::failure::Failure;
use crate::output::Output;
use crate::serve;

/// What every client command has at hand.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) output: Output,
}

/// How a command ends.
pub(crate) type Ended = Result<ExitCode, Failure>;

/// Runs the command to its end.
pub(crate) fn run(cli: Cli, output: Output) -> Ended {
    let command = match cli.command {
        Command::Client(command) => command,
        Command::Serve(args) => return serve::run(&args, cli.socket.as_deref(), output),
        Command::Pool(command) => return pool::run(&command, output),
        Command::Ca(args) => return ca::run(&args, output),
        Command::Completions(args) => return completions::run(&args),
    };
    let context = Context {
        client: Client::new(cli.socket.unwrap_or_else(|| DEFAULT_SOCKET.into())).for_team(cli.team),
        output,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::because("cannot start the async runtime", &error))?;
    let ended = runtime.block_on(client(&context, command));
    // Reads of stdin and the like cannot be given up, and must not keep the process.
    runtime.shutdown_background();
    ended
}

async fn client(context: &Context, command: ClientCommand) -> Ended {
    match command {
        ClientCommand::Create(args) => create::run(context, args).await,
        ClientCommand::Exec(args) => exec::run(context, args).await,
        ClientCommand::Attach(args) => attach::run(context, &args).await,
        ClientCommand::Ps(args) => ps::run(context, &args).await,
        ClientCommand::Shell(args) => shell::run(context, &args).await,
        ClientCommand::Ls(args) => list::run(context, &args).await,
        ClientCommand::Inspect(args) => inspect::run(context, &args).await,
        ClientCommand::Pause(args) => pause::run(context, &args).await,
        ClientCommand::Resume(args) => resume::run(context, &args).await,
        ClientCommand::Stop(args) => stop::run(context, &args).await,
        ClientCommand::Timeout(args) => timeout::run(context, &args).await,
        ClientCommand::Start(args) => start::run(context, &args).await,
        ClientCommand::Checkpoint(args) => checkpoint::run(context, &args).await,
        ClientCommand::History(args) => history::run(context, &args).await,
        ClientCommand::Rollback(args) => rollback::run(context, &args).await,
        ClientCommand::Snapshot(args) => snapshot::run(context, args).await,
        ClientCommand::Fork(args) => fork::run(context, &args).await,
        ClientCommand::Flatten(args) => flatten::run(context, args).await,
        ClientCommand::Rm(args) => destroy::run(context, &args).await,
        ClientCommand::Cp(args) => copy::run(context, args).await,
        ClientCommand::Logs(args) => logs::run(context, &args).await,
        ClientCommand::Stats(args) => stats::run(context, &args).await,
        ClientCommand::Events(args) => events::run(context, &args).await,
        ClientCommand::Template(command) => template::run(context, command).await,
        ClientCommand::Vmm(command) => vmm::run(context, command).await,
        ClientCommand::Kernel(command) => kernel::run(context, command).await,
        ClientCommand::Team(command) => team::run(context, command).await,
        ClientCommand::Key(command) => key::run(context, command).await,
        ClientCommand::Audit(args) => audit::run(context, &args).await,
        ClientCommand::Drain(args) => drain::run(context, &args).await,
        ClientCommand::Doctor(args) => doctor::run(context, &args).await,
        ClientCommand::Gc(args) => gc::run(context, &args).await,
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

/// A name as whoever asks would give it: another team's is said with the team.
pub(crate) fn of_team(context: &Context, team: &str, name: String) -> String {
    const DEFAULT: &str = "default";
    if team == context.client.team().unwrap_or(DEFAULT) {
        return name;
    }
    format!("{team}/{name}")
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
