//! The steps of a build: what they are, checked before anything begins.

use std::path::{Path, PathBuf};

use icebox_api::types::BuildStep;
use icebox_api::{ApiError, ErrorCode};

/// One thing to do.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Puts files into the sandbox.
    Copy {
        source: String,
        target: String,
        user: Option<String>,
        mode: Option<String>,
        archive: PathBuf,
    },
    /// Runs a command.
    Run {
        command: String,
        user: Option<String>,
    },
    /// Sets variables, for the steps from here on and in sandboxes.
    Env(Vec<(String, String)>),
    /// Where commands run from here on.
    Workdir(String),
    /// Who runs them.
    User(String),
}

impl Step {
    /// Reads a step. `find` knows where archives are.
    pub(super) fn read(
        step: &BuildStep,
        find: impl FnOnce(&str) -> Result<Option<PathBuf>, ApiError>,
    ) -> Result<Self, ApiError> {
        let invalid =
            |why: &str| ApiError::new(ErrorCode::Invalid, format!("a step {} {why}", step.kind));
        let argument = |at: usize| step.args.get(at).filter(|it| !it.is_empty()).cloned();
        let required = |at: usize| argument(at).ok_or_else(|| invalid("has too few arguments"));
        if step.args.iter().any(|argument| argument.contains('\0')) {
            return Err(invalid("has a zero byte in an argument"));
        }
        match step.kind.as_str() {
            "COPY" => {
                let hash = step.files_hash.as_deref();
                let hash = hash.ok_or_else(|| invalid("names no files"))?;
                let archive =
                    find(hash)?.ok_or_else(|| invalid("names files that were not sent"))?;
                Ok(Self::Copy {
                    source: required(0)?,
                    target: required(1)?,
                    user: argument(2),
                    mode: argument(3),
                    archive,
                })
            }
            "RUN" => Ok(Self::Run {
                command: required(0)?,
                user: argument(1),
            }),
            "ENV" => {
                let pairs = step.args.chunks(2).map(|pair| match pair {
                    [name, value] if !name.is_empty() && !name.contains('=') => {
                        Ok((name.clone(), value.clone()))
                    }
                    _ => Err(invalid("takes names and values in turn")),
                });
                Ok(Self::Env(pairs.collect::<Result<_, _>>()?))
            }
            "WORKDIR" => Ok(Self::Workdir(required(0)?)),
            "USER" => Ok(Self::User(required(0)?)),
            _ => Err(invalid(
                "is none that is known: COPY, RUN, ENV, WORKDIR and USER are",
            )),
        }
    }

    /// What the log says when it begins.
    pub(super) fn title(&self) -> String {
        match self {
            Self::Copy { source, target, .. } => format!("COPY {source} {target}"),
            Self::Run { command, .. } => format!("RUN {command}"),
            Self::Env(pairs) => {
                let names: Vec<_> = pairs.iter().map(|(name, _)| name.as_str()).collect();
                format!("ENV {}", names.join(" "))
            }
            Self::Workdir(path) => format!("WORKDIR {path}"),
            Self::User(user) => format!("USER {user}"),
        }
    }
}

/// `path` as seen from `workdir`.
pub(super) fn absolute(path: &str, workdir: &str) -> String {
    Path::new(workdir).join(path).to_string_lossy().into_owned()
}

/// Unpacks an archive of a build's context and copies from it as a Dockerfile's COPY does: the content of a directory, or
/// files; to a directory if the target ends with a slash, or is one, or there are several. Run by bash as root, with
/// archive, source, target, user (may be empty), mode (may be empty).
pub(super) const COPY: &str = r#"
set -euo pipefail
shopt -s nullglob globstar dotglob
archive=$1 source=${2#./} target=$3 user=$4 mode=$5
unpacked=$(mktemp -d /tmp/.icebox-copy.XXXXXX)
trap 'rm -rf "$unpacked" "$archive"' EXIT
tar -xf "$archive" -C "$unpacked" --no-same-owner
cd "$unpacked"
[ -z "$user" ] || chown -R "$user:$(id -gn "$user")" .
[ -z "$mode" ] || find . -mindepth 1 -type f -exec chmod "$mode" {} +
directory() {
    [ -d "$1" ] || { mkdir -p "$1"; [ -z "$user" ] || chown "$user:$(id -gn "$user")" "$1"; }
}
IFS=
case "${source%/}" in
'' | . ) found=(.) ;;
*) found=(${source%/}) ; [ ${#found[@]} -gt 0 ] && [ -e "${found[0]}" ] || { echo "there is no $source among the files" >&2; exit 1; } ;;
esac
if [ ${#found[@]} -eq 1 ] && [ -f "${found[0]}" ] && [ "${target%/}" = "$target" ] && [ ! -d "$target" ]; then
    directory "$(dirname "$target")"
    cp -a "${found[0]}" "$target"
    exit
fi
directory "${target%/}/"
for one in "${found[@]}"; do
    if [ -d "$one" ]; then cp -a "$one/." "$target"; else cp -a "$one" "$target"; fi
done
"#;

#[cfg(test)]
mod tests {
    use super::*;

    fn read(kind: &str, args: &[&str]) -> Result<Step, ApiError> {
        let step = BuildStep {
            kind: kind.to_owned(),
            args: args.iter().map(|it| (*it).to_owned()).collect(),
            files_hash: Some("hash".to_owned()),
        };
        Step::read(&step, |_| Ok(Some("/archive".into())))
    }

    #[test]
    fn steps_are_what_the_sdks_write() {
        let run = |user: Option<&str>| Step::Run {
            command: "true".to_owned(),
            user: user.map(ToOwned::to_owned),
        };
        assert_eq!(read("RUN", &["true"]).expect("a step"), run(None));
        assert_eq!(
            read("RUN", &["true", "root"]).expect("a step"),
            run(Some("root"))
        );
        let copy = read("COPY", &["a", "b/", "", "0644"]).expect("a step");
        assert!(matches!(copy, Step::Copy { user: None, mode: Some(mode), .. } if mode == "0644"));
        let pairs = [("A", "1"), ("B", "")].map(|(a, b)| (a.to_owned(), b.to_owned()));
        let env = read("ENV", &["A", "1", "B", ""]).expect("a step");
        assert_eq!(env, Step::Env(pairs.to_vec()));
        for (kind, args) in [
            ("RUN", &[][..]),
            ("ENV", &["A"]),
            ("ENV", &["A=B", "1"]),
            ("VOLUME", &["/x"]),
            ("COPY", &["a"]),
        ] {
            assert!(read(kind, args).is_err(), "{kind} {args:?}");
        }
    }

    #[test]
    fn paths_begin_where_commands_run() {
        assert_eq!(absolute("b/", "/a"), "/a/b/");
        assert_eq!(absolute("/c", "/a"), "/c");
    }

    /// The script, without the guest around it.
    #[test]
    fn copying_is_a_dockerfiles() {
        use std::process::Command;

        let scene = tempfile::tempdir().expect("a directory");
        let at = |name: &str| scene.path().join(name);
        std::fs::create_dir_all(at("context/app/sub")).expect("made");
        for file in ["one.txt", "two.txt", "app/.hidden", "app/sub/deep"] {
            std::fs::write(at("context").join(file), file).expect("written");
        }
        let out = at("out");
        let copy = |source: &str, target: &str| {
            let archive = at("archive");
            let packed = Command::new("tar")
                .arg("-cf")
                .arg(&archive)
                .arg("-C")
                .arg(at("context"))
                .arg(".")
                .status();
            assert!(packed.expect("tar").success());
            let copied = Command::new("bash")
                .args(["-c", COPY, "copy"])
                .arg(&archive)
                .arg(source)
                .arg(format!("{}/{target}", out.display()))
                .args(["", ""])
                .status();
            assert!(!archive.exists());
            copied.expect("bash").success()
        };
        for (source, target, made) in [
            ("one.txt", "file", "file"),
            ("one.txt", "dir/", "dir/one.txt"),
            ("./one.txt", "dir", "dir/one.txt"),
            ("*.txt", "many/", "many/two.txt"),
            ("app", "app2", "app2/.hidden"),
            ("app/", "app3/", "app3/sub/deep"),
            (".", "all", "all/app/sub/deep"),
        ] {
            assert!(copy(source, target), "{source} {target}");
            assert!(out.join(made).is_file(), "{source} {target}: {made}");
        }
        assert!(!copy("nothing*", "x"), "what is not there");
    }
}
