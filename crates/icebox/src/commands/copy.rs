//! `icebox cp`
//!
//! One file travels as plain bytes, a directory as a tar stream that a `tar` in the guest makes or takes. Both are
//! streams: memory does not grow with what is copied. What comes out of a sandbox is not trusted: nothing of it lands
//! outside the directory that was asked for, and only files, directories and links do.

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use futures_util::stream;
use icebox_agent_api::client::{AgentClient, AgentError, Command, Event, Upload};
use icebox_agent_api::proto::filesystem::{EntryInfo, FileType, MakeDirRequest, StatRequest};
use tar::EntryType;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_util::io::{ReaderStream, StreamReader, SyncIoBridge};

use super::{Context, Ended, process};
use crate::failure::Failure;
use crate::output::Progress;

/// How much of a tar stream is under way inside this process.
const PIPE: usize = 256 << 10;

/// Copy files and directories into a sandbox or out of it.
///
/// One of the two is SANDBOX:PATH, relative to the user's home in the sandbox; the other a path here, or - for this
/// command's own input or output.
#[derive(Debug, clap::Args)]
#[command(after_help = "A local path with a colon in its first part is written ./like:this.")]
pub(crate) struct Args {
    /// What to copy.
    #[arg(value_parser = Place::parse)]
    from: Place,

    /// Where to. An existing directory receives the copy inside it.
    #[arg(value_parser = Place::parse)]
    to: Place,

    /// Whose home relative paths begin at, and whom single files that are copied in belong to, instead of the sandbox's
    /// default user.
    #[arg(short, long)]
    user: Option<String>,

    /// Resume the sandbox first if it is paused.
    #[arg(long)]
    resume: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    /// Our own input or output.
    Stream,
    Here(PathBuf),
    There {
        sandbox: String,
        path: String,
    },
}

impl Place {
    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() {
            return Err("a path is needed, and this is empty".to_owned());
        }
        if text == "-" {
            return Ok(Self::Stream);
        }
        match text.split_once(':') {
            Some((sandbox, _)) if sandbox.contains('/') => Ok(Self::Here(text.into())),
            Some(("", _)) => Err("the sandbox before the colon is missing".to_owned()),
            Some((_, "")) => Err("the path after the colon is missing".to_owned()),
            Some((sandbox, path)) => Ok(Self::There {
                sandbox: sandbox.to_owned(),
                path: path.to_owned(),
            }),
            None => Ok(Self::Here(text.into())),
        }
    }
}

pub(crate) async fn run(context: &Context, args: Args) -> Ended {
    let progress = context.output.progress();
    let (sandbox, copied) = match (args.from, args.to) {
        (Place::There { .. }, Place::There { .. }) => {
            return Err(Failure::new("both places are in sandboxes")
                .hint("copy to a local file first, or through a pipe: `icebox cp A:x - | icebox cp - B:x`"));
        }
        (from, Place::There { sandbox, path }) => {
            let client = client(context, &sandbox, args.user.as_deref(), args.resume).await?;
            (sandbox, into(&client, from, &path, &progress).await?)
        }
        (Place::There { sandbox, path }, to) => {
            let client = client(context, &sandbox, args.user.as_deref(), args.resume).await?;
            (sandbox, out_of(&client, &path, to, &progress).await?)
        }
        _ => {
            return Err(Failure::new("neither place is in a sandbox")
                .hint("write one of them as SANDBOX:PATH"));
        }
    };
    drop(progress);
    if context.output.is_json() {
        let document = serde_json::json!({ "sandbox": sandbox, "copiedBytes": copied });
        context.output.document(&document)?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn client(
    context: &Context,
    sandbox: &str,
    user: Option<&str>,
    resume: bool,
) -> Result<AgentClient, Failure> {
    let (client, _) = process::agent(context, sandbox, resume).await?;
    Ok(match user {
        Some(user) => client.with_user(user),
        None => client,
    })
}

// Into the sandbox.

async fn into(
    client: &AgentClient,
    from: Place,
    to: &str,
    progress: &Progress,
) -> Result<u64, Failure> {
    let Place::Here(from) = from else {
        let content = ReaderStream::new(tokio::io::stdin());
        return send_file(client, to, content, None, progress).await;
    };
    let cannot =
        |error: &io::Error| Failure::because(format!("cannot read {}", from.display()), error);
    let metadata = std::fs::metadata(&from).map_err(|error| cannot(&error))?;
    let name = from.canonicalize().ok().and_then(|path| {
        path.file_name()
            .map(|name| name.to_string_lossy().into_owned())
    });
    let to = match (stat(client, to).await?, name) {
        (Some(there), Some(name)) if is_directory(&there) => join(to, &name),
        (None, Some(name)) if to.ends_with('/') && metadata.is_file() => join(to, &name),
        _ => to.to_owned(),
    };
    if metadata.is_dir() {
        return send_tree(client, &from, &to, progress).await;
    }
    if !metadata.is_file() {
        return Err(Failure::new(format!(
            "{} is neither a file nor a directory",
            from.display()
        )));
    }
    let file = tokio::fs::File::open(&from)
        .await
        .map_err(|error| cannot(&error))?;
    let copied = send_file(
        client,
        &to,
        ReaderStream::with_capacity(file, PIPE),
        Some(metadata.len()),
        progress,
    )
    .await?;
    if metadata.permissions().mode() & 0o111 != 0 {
        let mode = format!("{:o}", metadata.permissions().mode() & 0o777);
        let chmod = client
            .run(Command::new("chmod").args([mode.as_str(), "--", &to]))
            .await;
        if !chmod.is_ok_and(|output| output.exit.shell_code() == 0) {
            progress.message("the copy is not executable: the sandbox has no chmod that works");
        }
    }
    Ok(copied)
}

async fn send_file(
    client: &AgentClient,
    to: &str,
    content: impl stream::Stream<Item = io::Result<Bytes>> + Send + 'static,
    total: Option<u64>,
    progress: &Progress,
) -> Result<u64, Failure> {
    let upload = Upload {
        path: to.to_owned(),
        ..Upload::default()
    };
    let (counter, mut counted) = tokio::sync::watch::channel(0_u64);
    let content = content.inspect_ok(move |chunk| {
        counter.send_modify(|sent| *sent += chunk.len() as u64);
    });
    let mut sending = std::pin::pin!(client.write_file(&upload, content));
    loop {
        tokio::select! {
            sent = &mut sending => {
                sent.map_err(|error| Failure::of(&error))?;
                let copied = *counted.borrow();
                return Ok(copied);
            }
            Ok(()) = counted.changed() => progress.advance(*counted.borrow_and_update(), total, true),
        }
    }
}

async fn send_tree(
    client: &AgentClient,
    from: &Path,
    to: &str,
    progress: &Progress,
) -> Result<u64, Failure> {
    make_directory(client, to).await?;
    let mut command = Command::new("tar").args(["-xf", "-", "-C", to]);
    command.stdin = true;
    let mut process = client
        .start(command)
        .await
        .map_err(|error| no_tar(&error))?;
    let mut input = process.input();
    let (writer, mut reader) = tokio::io::duplex(PIPE);
    let source = from.to_owned();
    let packed = tokio::task::spawn_blocking(move || -> io::Result<()> {
        let mut archive = tar::Builder::new(SyncIoBridge::new(writer));
        archive.follow_symlinks(false);
        archive.append_dir_all(".", source)?;
        archive.into_inner()?.shutdown()
    });
    let feed = async move {
        let mut copied = 0;
        let mut buffer = vec![0; PIPE];
        loop {
            match reader.read(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(read) => {
                    copied += read as u64;
                    if input
                        .send(Bytes::copy_from_slice(&buffer[..read]))
                        .await
                        .is_err()
                    {
                        // tar has ended: its own message says why.
                        return copied;
                    }
                    progress.advance(copied, None, true);
                }
            }
        }
        // Fails if tar has ended already, which its exit code tells better.
        input.finish().await.ok();
        copied
    };
    let wait = async {
        let mut said = Vec::new();
        loop {
            match process.next().await {
                Ok(Event::Exited(exit)) => return Ok((exit.shell_code(), said)),
                Ok(Event::Stdout(bytes) | Event::Stderr(bytes) | Event::Terminal(bytes)) => {
                    said.extend_from_slice(&bytes);
                }
                Err(error) => return Err(Failure::of(&error)),
            }
        }
    };
    let (copied, ended) = tokio::join!(feed, wait);
    let (code, said) = ended?;
    tar_ended(code, &said)?;
    packed
        .await
        .map_err(io::Error::other)
        .flatten()
        .map_err(|error| Failure::because(format!("cannot read {}", from.display()), &error))?;
    Ok(copied)
}

// Out of it.

async fn out_of(
    client: &AgentClient,
    from: &str,
    to: Place,
    progress: &Progress,
) -> Result<u64, Failure> {
    let there = stat(client, from)
        .await?
        .ok_or_else(|| Failure::new(format!("{from}: no such file or directory in the sandbox")))?;
    let Place::Here(to) = to else {
        return receive(client, from, &mut tokio::io::stdout(), None, progress).await;
    };
    let base = from
        .trim_end_matches('/')
        .rsplit('/')
        .next()
        .unwrap_or_default();
    let to = if to.is_dir() && !base.is_empty() && base != ".." && base != "." {
        to.join(base)
    } else {
        to
    };
    if is_directory(&there) {
        return receive_tree(client, from, &to, progress).await;
    }
    let cannot =
        |error: &io::Error| Failure::because(format!("cannot write {}", to.display()), error);
    let parent = match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    if !parent.is_dir() {
        return Err(Failure::new(format!(
            "cannot write {}: {} is no directory",
            to.display(),
            parent.display()
        )));
    }
    // The copy appears when it is complete.
    let mode = if there.mode & 0o111 == 0 {
        0o644
    } else {
        0o755
    };
    let staged = tempfile::Builder::new()
        .permissions(std::fs::Permissions::from_mode(mode))
        .tempfile_in(parent)
        .map_err(|error| cannot(&error))?;
    let file = staged.reopen().map_err(|error| cannot(&error))?;
    let mut file = tokio::fs::File::from_std(file);
    let total = u64::try_from(there.size).ok();
    let copied = receive(client, from, &mut file, total, progress).await?;
    staged.persist(&to).map_err(|error| cannot(&error.error))?;
    Ok(copied)
}

async fn receive(
    client: &AgentClient,
    from: &str,
    to: &mut (impl tokio::io::AsyncWrite + Unpin),
    total: Option<u64>,
    progress: &Progress,
) -> Result<u64, Failure> {
    let mut content = client
        .read_file(from)
        .await
        .map_err(|error| Failure::of(&error))?;
    let mut copied = 0;
    while let Some(chunk) = content.chunk().await.map_err(|error| Failure::of(&error))? {
        to.write_all(&chunk).await?;
        copied += chunk.len() as u64;
        progress.advance(copied, total, true);
    }
    to.flush().await?;
    Ok(copied)
}

async fn receive_tree(
    client: &AgentClient,
    from: &str,
    to: &Path,
    progress: &Progress,
) -> Result<u64, Failure> {
    let cannot =
        |error: &io::Error| Failure::because(format!("cannot write {}", to.display()), error);
    std::fs::create_dir_all(to).map_err(|error| cannot(&error))?;
    let command = Command::new("tar").args(["-cf", "-", "-C", from, "."]);
    let mut process = client
        .start(command)
        .await
        .map_err(|error| no_tar(&error))?;
    let (chunks, receiver) = tokio::sync::mpsc::channel::<io::Result<Bytes>>(4);
    let target = to.to_owned();
    let reader = StreamReader::new(tokio_stream::wrappers::ReceiverStream::new(receiver));
    let bridge = SyncIoBridge::new(reader);
    let unpacked = tokio::task::spawn_blocking(move || unpack(bridge, &target));
    let mut copied = 0;
    let mut said = Vec::new();
    let code = loop {
        match process.next().await.map_err(|error| Failure::of(&error))? {
            Event::Stdout(bytes) | Event::Terminal(bytes) => {
                copied += bytes.len() as u64;
                progress.advance(copied, None, true);
                if chunks.send(Ok(bytes)).await.is_err() {
                    // The unpacking has failed: its own error says why.
                    break 0;
                }
            }
            Event::Stderr(bytes) => said.extend_from_slice(&bytes),
            Event::Exited(exit) => break exit.shell_code(),
        }
    };
    drop(chunks);
    let skipped = unpacked
        .await
        .map_err(io::Error::other)
        .flatten()
        .map_err(|error| cannot(&error))?;
    tar_ended(code, &said)?;
    if skipped > 0 {
        progress.message(&format!(
            "{skipped} entries were left out: devices, pipes, or what would have landed elsewhere"
        ));
    }
    Ok(copied)
}

/// Unpacks what a sandbox sent, and says how many entries were left out.
fn unpack(archive: impl io::Read, target: &Path) -> io::Result<u64> {
    let mut archive = tar::Archive::new(archive);
    archive.set_preserve_permissions(false);
    archive.set_unpack_xattrs(false);
    let mut skipped = 0;
    for entry in archive.entries()? {
        let mut entry = entry?;
        let plain = matches!(
            entry.header().entry_type(),
            EntryType::Regular
                | EntryType::Continuous
                | EntryType::GNUSparse
                | EntryType::Directory
                | EntryType::Symlink
                | EntryType::Link
        );
        if !plain || !entry.unpack_in(target)? {
            skipped += 1;
        }
    }
    Ok(skipped)
}

// What both directions need.

async fn stat(client: &AgentClient, path: &str) -> Result<Option<EntryInfo>, Failure> {
    let request = StatRequest {
        path: path.to_owned(),
        ..StatRequest::default()
    };
    match client.filesystem().stat(request).await {
        Ok(answer) => Ok(answer.into_owned().entry.into_option()),
        Err(error) if error.code == connectrpc::ErrorCode::NotFound => Ok(None),
        Err(error) => Err(filesystem(&error)),
    }
}

fn is_directory(entry: &EntryInfo) -> bool {
    entry.r#type == FileType::FILE_TYPE_DIRECTORY
}

async fn make_directory(client: &AgentClient, path: &str) -> Result<(), Failure> {
    let request = MakeDirRequest {
        path: path.to_owned(),
        ..MakeDirRequest::default()
    };
    match client.filesystem().make_dir(request).await {
        Ok(_) => Ok(()),
        Err(error) if error.code == connectrpc::ErrorCode::AlreadyExists => Ok(()),
        Err(error) => Err(filesystem(&error)),
    }
}

fn filesystem(error: &connectrpc::ConnectError) -> Failure {
    Failure::new(error.message.clone().unwrap_or_else(|| error.to_string()))
}

fn join(directory: &str, name: &str) -> String {
    format!("{}/{name}", directory.trim_end_matches('/'))
}

fn no_tar(error: &AgentError) -> Failure {
    if error.code() == Some(connectrpc::ErrorCode::NotFound) {
        Failure::new("directories need `tar` in the sandbox, and there is none")
            .hint("copy files one by one, or use a template that has tar")
    } else {
        Failure::of(error)
    }
}

fn tar_ended(code: i32, said: &[u8]) -> Result<(), Failure> {
    if code == 0 {
        return Ok(());
    }
    let said = String::from_utf8_lossy(said);
    Err(Failure::new(format!(
        "tar in the sandbox failed with code {code}: {}",
        said.trim_end()
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_colon_before_any_slash_makes_a_place_in_a_sandbox() {
        let there = |sandbox: &str, path: &str| Place::There {
            sandbox: sandbox.to_owned(),
            path: path.to_owned(),
        };
        assert_eq!(Place::parse("web:/tmp/x"), Ok(there("web", "/tmp/x")));
        assert_eq!(Place::parse("web:x:y"), Ok(there("web", "x:y")));
        assert_eq!(Place::parse("./web:x"), Ok(Place::Here("./web:x".into())));
        assert_eq!(Place::parse("x"), Ok(Place::Here("x".into())));
        assert_eq!(Place::parse("-"), Ok(Place::Stream));
        for bad in ["", ":x", "web:"] {
            assert!(Place::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_hostile_archive_writes_nothing_outside_and_no_devices() {
        let mut archive = tar::Builder::new(Vec::new());
        let mut add = |path: &str, kind: EntryType, link: Option<&str>| {
            let mut header = tar::Header::new_gnu();
            // Written by hand: the builder refuses such names.
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            header.set_entry_type(kind);
            header.set_mode(0o4755);
            header.set_size(0);
            if let Some(link) = link {
                header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
            }
            header.set_cksum();
            archive.append(&header, io::empty()).expect("in memory");
        };
        add("good", EntryType::Regular, None);
        add("../escaped", EntryType::Regular, None);
        add("device", EntryType::Char, None);
        add("pipe", EntryType::Fifo, None);
        add("out", EntryType::Symlink, Some(".."));
        let archive = archive.into_inner().expect("in memory");
        let directory = tempfile::tempdir().expect("a directory");
        let target = directory.path().join("target");
        std::fs::create_dir(&target).expect("a directory");
        assert_eq!(unpack(&archive[..], &target).expect("it reads"), 3);
        let mode = std::fs::metadata(target.join("good"))
            .expect("unpacked")
            .permissions()
            .mode();
        assert_eq!(mode & 0o7000, 0, "no set-user-id");
        assert!(!directory.path().join("escaped").exists());
        assert!(!target.join("device").exists() && !target.join("pipe").exists());

        let mut through = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(1);
        header.set_mode(0o644);
        header.set_cksum();
        through
            .append_data(&mut header, "out/escaped", &b"x"[..])
            .expect("in memory");
        let through = through.into_inner().expect("in memory");
        // Refused as an error or left out: either way it does not land outside.
        unpack(&through[..], &target).ok();
        assert!(!directory.path().join("escaped").exists());
    }

    /// The damage is the same in each run.
    #[test]
    fn damaged_archives_write_nothing_outside() {
        const ROUNDS: usize = 1000;
        let mut archive = tar::Builder::new(Vec::new());
        let long = "long/".repeat(30);
        for (path, kind, link) in [
            ("directory/", EntryType::Directory, None),
            ("directory/file", EntryType::Regular, None),
            (&*long, EntryType::Regular, None),
            ("link", EntryType::Symlink, Some("directory")),
            ("hard", EntryType::Link, Some("directory/file")),
            ("link/through", EntryType::Regular, None),
        ] {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_mode(0o644);
            let content: &[u8] = if kind == EntryType::Regular {
                b"hello"
            } else {
                b""
            };
            header.set_size(content.len() as u64);
            match link {
                Some(to) => archive.append_link(&mut header, path, to),
                None => archive.append_data(&mut header, path, content),
            }
            .expect("in memory");
        }
        let archive = archive.into_inner().expect("in memory");
        let mut random = fastrand::Rng::with_seed(0x1ceb_0c5e);
        let directory = tempfile::tempdir().expect("a directory");
        let target = directory.path().join("target");
        let mut unpacked = 0;
        for round in 0..ROUNDS {
            let mut damaged = archive.clone();
            for _ in 0..random.usize(1..=4) {
                // Mostly in headers, whose checksum is then right again: what is behind it is what parses.
                let block = random.usize(..damaged.len() / 512) * 512;
                let at = block + random.usize(..512);
                damaged[at] = *random
                    .choice(b"./0179\0\xff\x80KLxgS125")
                    .expect("not empty");
                if random.bool() {
                    let header: &mut [u8] = &mut damaged[block..block + 512];
                    header[148..156].fill(b' ');
                    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
                    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
                }
            }
            if random.u8(0..10) == 0 {
                damaged.truncate(random.usize(..damaged.len()));
            }
            std::fs::create_dir(&target).expect("a directory");
            unpacked += usize::from(unpack(&damaged[..], &target).is_ok());
            std::fs::remove_dir_all(&target).expect("only what we may remove");
            let mut left = std::fs::read_dir(directory.path()).expect("a directory");
            assert!(
                left.next().is_none(),
                "round {round} wrote beside its target"
            );
        }
        assert!(
            unpacked > ROUNDS / 10,
            "{unpacked} of {ROUNDS} were readable"
        );
    }
}
