//! One kernel, one agent and one Debian image for every test on this machine, and other people's programs that some need.
//!
//! Making them takes most of a minute and a network; so they are made once, kept in a cache, and only ever read. The cache
//! is `$ICEBOX_TEST_CACHE`, or `target/test-cache` in the repository. Tests are processes of their own, so a lock file
//! serialises the making.

use std::{
    env,
    fs::{self, File},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use super::{
    ImageError, Places, Silent,
    initramfs::{self, Initramfs},
    kernel::{self, DEFAULT_PACKAGE, Kernel},
    rootfs::{self, Recipe, Source},
};

/// What every fixture image is made of: enough for a shell, Python, git, and commands as another
/// user.
const SUITE: &str = "bookworm";
const INCLUDE: [&str; 3] = ["git", "python3", "sudo"];
/// MiB of it, half of them in use. Every site that imports it reads and hashes all of them, for which an emulated machine
/// takes half a minute for each 512.
const IMAGE_MIB: u64 = 512;

/// Why there is no fixture. A test that gets this fails; it does not pass by skipping.
#[derive(Debug, thiserror::Error)]
#[allow(
    missing_docs,
    reason = "the message of each variant says what it and its fields are"
)]
pub enum FixtureError {
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error("cannot {op} {}", .path.display())]
    Io {
        op: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("building the agent failed:\n{0}")]
    Agent(String),
    #[error("{command} failed:\n{said}")]
    Program { command: String, said: String },
}

fn at(op: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> FixtureError {
    let path = path.to_owned();
    move |source| FixtureError::Io { op, path, source }
}

fn repository() -> PathBuf {
    let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
    crate_dir.ancestors().nth(2).unwrap_or(crate_dir).to_owned()
}

/// The cache directory.
#[must_use]
pub fn cache_dir() -> PathBuf {
    env::var_os("ICEBOX_TEST_CACHE")
        .map_or_else(|| repository().join("target/test-cache"), PathBuf::from)
}

/// Holds the lock until dropped.
fn lock(name: &str) -> Result<File, FixtureError> {
    let dir = cache_dir();
    fs::create_dir_all(&dir).map_err(at("make", &dir))?;
    let path = dir.join(format!("{name}.lock"));
    let file = File::create(&path).map_err(at("create", &path))?;
    file.lock().map_err(at("lock", &path))?;
    Ok(file)
}

/// Places in the cache. Their staging is shared with other tests: look for leaks in places of your own.
#[must_use]
pub fn places() -> Places {
    Places::under(&cache_dir())
}

/// Debian's cloud kernel.
///
/// # Errors
/// It is not cached and cannot be fetched.
pub fn kernel() -> Result<Kernel, FixtureError> {
    let _lock = lock("kernel")?;
    let places = places();
    let current = |kernel: &Kernel| kernel.is_current();
    if let Some(kernel) = kernel::list(&places)?.into_iter().find(current) {
        return Ok(kernel);
    }
    Ok(kernel::fetch(&places, DEFAULT_PACKAGE, &Silent)?)
}

/// The static agent: `$ICEBOX_TEST_AGENT`, or built from this repository.
///
/// # Errors
/// Building it failed.
pub fn agent() -> Result<PathBuf, FixtureError> {
    const TARGET: &str = "x86_64-unknown-linux-gnu";
    if let Some(path) = env::var_os("ICEBOX_TEST_AGENT") {
        return Ok(path.into());
    }
    let repository = repository();
    let target_dir =
        env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository.join("target"), PathBuf::from);
    let _lock = lock("agent")?;
    let output = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args([
            "build",
            "--quiet",
            "--profile",
            "agent",
            "--target",
            TARGET,
            "--package",
            "icebox-agent",
        ])
        .env(
            "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
            "-C target-feature=+crt-static",
        )
        .env("CARGO_TARGET_DIR", &target_dir)
        .current_dir(&repository)
        .stdin(Stdio::null())
        .output()
        .map_err(at("run cargo in", &repository))?;
    if !output.status.success() {
        return Err(FixtureError::Agent(
            String::from_utf8_lossy(&output.stderr).into_owned(),
        ));
    }
    Ok(repository
        .join(target_dir)
        .join(TARGET)
        .join("agent/icebox-agent"))
}

/// The initramfs of [`kernel`] with [`agent`].
///
/// # Errors
/// One of the two cannot be made.
pub fn initramfs() -> Result<Initramfs, FixtureError> {
    let kernel = kernel()?;
    let agent = agent()?;
    let _lock = lock("kernel")?;
    Ok(initramfs::ensure(&kernel, &agent)?)
}

/// A root image of 1 GiB with a small Debian, Python and sudo. Read-only, also by its mode: copy it or put an overlay on
/// it.
///
/// # Errors
/// It is not cached and cannot be built.
pub fn debian_image() -> Result<PathBuf, FixtureError> {
    let _lock = lock("image")?;
    let path = cache_dir().join(format!("{SUITE}-{}-{IMAGE_MIB}M.ext4", INCLUDE.join("-")));
    if path.exists() {
        return Ok(path);
    }
    let recipe = Recipe {
        source: Source::Debian {
            suite: SUITE.to_owned(),
            include: INCLUDE.map(ToOwned::to_owned).to_vec(),
        },
        size: Some(IMAGE_MIB << 20),
    };
    let image = rootfs::build(&places(), &recipe, &Silent)?;
    fs::set_permissions(image.path(), fs::Permissions::from_mode(0o444))
        .map_err(at("set the mode of", image.path()))?;
    image.persist(&path)?;
    Ok(path)
}

/// The directory `name` of the cache, which `make` has filled at some time: whoever needs it first does, and others wait.
///
/// # Errors
/// It cannot be made, or `make` could not.
pub fn made(
    name: &str,
    make: impl FnOnce(&Path) -> Result<(), FixtureError>,
) -> Result<PathBuf, FixtureError> {
    let programs = cache_dir().join("programs");
    fs::create_dir_all(&programs).map_err(at("make", &programs))?;
    let _lock = lock(&format!("programs/{name}"))?;
    let (home, done) = (programs.join(name), programs.join(format!("{name}.done")));
    if done.exists() {
        return Ok(home);
    }
    match fs::remove_dir_all(&home) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(at("remove", &home)(error));
        }
        _ => fs::create_dir(&home).map_err(at("make", &home))?,
    }
    make(&home)?;
    File::create(&done).map_err(at("create", &done))?;
    Ok(home)
}

/// A Python of its own that has these packages, from where this machine's pip takes them.
///
/// # Errors
/// It cannot be made: there is no Python, or no such package.
pub fn python(packages: &[&str]) -> Result<PathBuf, FixtureError> {
    let name = format!("python-{}", packages.join("+"));
    made(&name, |home| virtual_environment(home, packages))
}

/// Fills `home` with a Python of its own, and packages.
///
/// # Errors
/// As of [`python`].
pub fn virtual_environment(home: &Path, packages: &[&str]) -> Result<(), FixtureError> {
    succeed(Command::new("python3").args(["-m", "venv"]).arg(home))?;
    let mut pip = Command::new(home.join("bin/pip"));
    pip.args(["install", "--quiet", "--disable-pip-version-check"]);
    succeed(pip.args(packages))
}

/// Writes a program of a test. It is never open for writing in this process: what another thread starts in that moment
/// would inherit that, and until it has gone, nobody could run the program ("text file busy").
///
/// # Errors
/// It cannot be written.
pub fn script(path: &Path, text: &str) -> Result<(), FixtureError> {
    let written = path.with_extension("written");
    fs::write(&written, text).map_err(at("write", &written))?;
    succeed(
        Command::new("install")
            .args(["-m", "755"])
            .arg(&written)
            .arg(path),
    )?;
    fs::remove_file(&written).map_err(at("remove", &written))
}

/// Runs a program that must succeed.
///
/// # Errors
/// It does not, with what it said.
pub fn succeed(command: &mut Command) -> Result<(), FixtureError> {
    let failed = |command: &Command, said: String| FixtureError::Program {
        command: format!("{command:?}"),
        said,
    };
    let output = match command.stdin(Stdio::null()).output() {
        Ok(output) => output,
        Err(error) => return Err(failed(command, error.to_string())),
    };
    if output.status.success() {
        return Ok(());
    }
    let said = [output.stdout, output.stderr].concat();
    Err(failed(command, String::from_utf8_lossy(&said).into_owned()))
}
