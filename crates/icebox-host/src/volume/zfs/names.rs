//! What the driver's datasets are called. The names say everything: no property and no file holds what they do not.
//!
//! ```text
//! <dataset>/<instance>                                 a file system that is never mounted; its owner is a property
//!   base-<digest>      @image                          an imported image
//!   import-<digest>                                    one that is being imported
//!   head-<line>        @<layer>.<line>.<next> …        what a guest writes to, and the layers that were frozen off it
//!   kept-<line>        @…                              nobody writes to it any more; there are layers that need it
//!   kept-<digest>      @image                          the same, of a base that was removed
//!   probe-<pid>-<n>                                    a trial
//! ```
//!
//! A volume's *line* is the sandbox and the number of the head that it was made as. Each freeze says in its snapshot's
//! name under which number the line goes on, or that it has ended: one atomic step makes the layer and the new head. A
//! promotion moves snapshots to other volumes; by its line, each still tells where it came from.
//!
//! A layer that was removed while something needs its snapshot gives up its name: `@gone.<line>.<next>`.

use std::fmt;

use icebox_engine::host::{ErrorKind, HostError};
use icebox_engine::id::{Digest, HeadId, LayerId, SandboxId};
use icebox_engine::layout::parse_number;

use crate::instance::Instance;

/// Bytes of the longest name that ZFS takes: `ZFS_MAX_DATASET_NAME_LEN` of include/sys/fs/zfs.h, without its final zero.
const NAME_MAX: usize = 255;
/// Bytes of the longest name below the root: a head, its volume's line twice and a layer.
const BELOW_MAX: usize = 1 + 5 + LINE_MAX + 1 + 21 + 1 + LINE_MAX + 1 + 10;
const LINE_MAX: usize = 21 + 1 + 10;

/// The dataset that holds everything of one installation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Root {
    parent: String,
    name: String,
}

impl Root {
    /// The root for `instance` in the dataset that the user named.
    ///
    /// # Errors
    /// It is no dataset's name, or too long for what comes below it.
    pub(super) fn new(dataset: &str, instance: &Instance) -> Result<Self, HostError> {
        let refuse = |why: &str| {
            Err(
                HostError::new(ErrorKind::Invalid, format!("zfs.dataset {dataset:?} {why}"))
                    .hint("name a file system of a pool, as tank/icebox"),
            )
        };
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:".contains(&byte);
        let is_component = |part: &str| {
            part.bytes().all(allowed)
                && part.starts_with(|first: char| first.is_ascii_alphanumeric())
        };
        if !dataset.split('/').all(is_component) {
            return refuse("is no name of a dataset");
        }
        let name = format!("{dataset}/{instance}");
        if name.len() + BELOW_MAX > NAME_MAX {
            return refuse("is too long a name");
        }
        Ok(Self {
            parent: dataset.to_owned(),
            name,
        })
    }

    /// The dataset that the user named.
    pub(super) fn parent(&self) -> &str {
        &self.parent
    }

    /// The root's own name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// The full name of a volume.
    pub(super) fn volume(&self, volume: &Volume) -> String {
        format!("{}/{volume}", self.name)
    }

    /// The full name of a snapshot.
    pub(super) fn snapshot(&self, volume: &Volume, snapshot: &Snapshot) -> String {
        format!("{}/{volume}@{snapshot}", self.name)
    }

    /// The volume of ours with this full name.
    pub(super) fn parse_volume(&self, name: &str) -> Option<Volume> {
        Volume::parse(name.strip_prefix(&self.name)?.strip_prefix('/')?)
    }

    /// The volume and snapshot of ours with this full name.
    pub(super) fn parse_snapshot(&self, name: &str) -> Option<(Volume, Snapshot)> {
        let (volume, snapshot) = name.split_once('@')?;
        Some((self.parse_volume(volume)?, Snapshot::parse(snapshot)?))
    }
}

/// A volume that a guest writes or wrote to, from its first head to its last.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Line(pub(super) HeadId);

impl Line {
    fn parse(text: &str) -> Option<Self> {
        let (sandbox, number) = text.split_once('-')?;
        Some(Self(HeadId {
            sandbox: sandbox.parse::<SandboxId>().ok()?,
            number: parse_number(number)?,
        }))
    }

    /// The head of this line with another number.
    pub(super) fn head(&self, number: u32) -> HeadId {
        HeadId {
            number,
            ..self.0.clone()
        }
    }
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.0.sandbox, self.0.number)
    }
}

/// A volume of ours.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Volume {
    /// A finished base.
    Base(Digest),
    /// A base that is being imported, or that was not finished.
    Import(Digest),
    /// What a guest writes to.
    Head(Line),
    /// A line that ended. Its snapshots are needed.
    Kept(Line),
    /// A base that was removed. Its snapshot is needed.
    KeptBase(Digest),
    /// A trial of the process with this number.
    Probe(u32, u8),
}

impl Volume {
    fn parse(text: &str) -> Option<Self> {
        let (kind, rest) = text.split_once('-')?;
        match kind {
            "base" => Some(Self::Base(rest.parse().ok()?)),
            "import" => Some(Self::Import(rest.parse().ok()?)),
            "head" => Some(Self::Head(Line::parse(rest)?)),
            "kept" => match rest.parse() {
                Ok(digest) => Some(Self::KeptBase(digest)),
                Err(_) => Some(Self::Kept(Line::parse(rest)?)),
            },
            "probe" => {
                let (process, number) = rest.split_once('-')?;
                let number = parse_number(number)?.try_into().ok()?;
                Some(Self::Probe(parse_number(process)?, number))
            }
            _ => None,
        }
    }

    /// Whether nobody writes to it any more, so that it goes when nothing needs its snapshots.
    pub(super) fn is_kept(&self) -> bool {
        matches!(self, Self::Kept(_) | Self::KeptBase(_))
    }

    /// What it is called when nobody writes to it any more.
    pub(super) fn kept(&self) -> Self {
        match self {
            Self::Head(line) => Self::Kept(line.clone()),
            Self::Base(digest) => Self::KeptBase(digest.clone()),
            other => other.clone(),
        }
    }
}

impl fmt::Display for Volume {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Base(digest) => write!(f, "base-{digest}"),
            Self::Import(digest) => write!(f, "import-{digest}"),
            Self::Head(line) => write!(f, "head-{line}"),
            Self::Kept(line) => write!(f, "kept-{line}"),
            Self::KeptBase(digest) => write!(f, "kept-{digest}"),
            Self::Probe(process, number) => write!(f, "probe-{process}-{number}"),
        }
    }
}

/// How a line goes on after a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Next {
    /// As the head with this number.
    Head(u32),
    /// Not at all.
    End,
}

/// A snapshot of ours.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Snapshot {
    /// A whole base.
    Image,
    /// A head as it was when it was frozen.
    Frozen {
        /// The layer that it is the data of. `None` if that was removed.
        layer: Option<LayerId>,
        /// The line that it was taken of, whichever volume it is in now.
        line: Line,
        /// How that line went on.
        next: Next,
    },
}

const IMAGE: &str = "image";
const GONE: &str = "gone";
const END: &str = "end";

impl Snapshot {
    /// What the name after the `@` says. `None` if it is not ours.
    pub(super) fn parse(text: &str) -> Option<Self> {
        if text == IMAGE {
            return Some(Self::Image);
        }
        let mut parts = text.split('.');
        let (layer, line, next) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() {
            return None;
        }
        Some(Self::Frozen {
            layer: match layer {
                GONE => None,
                id => Some(id.parse().ok()?),
            },
            line: Line::parse(line)?,
            next: match next {
                END => Next::End,
                number => Next::Head(parse_number(number)?),
            },
        })
    }

    pub(super) fn layer(&self) -> Option<&LayerId> {
        match self {
            Self::Frozen { layer, .. } => layer.as_ref(),
            Self::Image => None,
        }
    }

    /// The same snapshot of a layer that was removed.
    pub(super) fn gone(&self) -> Self {
        match self.clone() {
            Self::Frozen { line, next, .. } => Self::Frozen {
                layer: None,
                line,
                next,
            },
            Self::Image => Self::Image,
        }
    }

    /// Whether its line went on as `head`.
    pub(super) fn goes_on_as(&self, head: &HeadId) -> bool {
        matches!(self, Self::Frozen { line, next: Next::Head(number), .. }
            if line.head(*number) == *head)
    }

    /// Whether it ended a line of this sandbox.
    pub(super) fn ends(&self, sandbox: &SandboxId) -> bool {
        matches!(self, Self::Frozen { line, next: Next::End, .. } if line.0.sandbox == *sandbox)
    }

    /// How the line went on, if this was taken of `of`.
    pub(super) fn next_of(&self, of: &Line) -> Option<Next> {
        match self {
            Self::Frozen { line, next, .. } if line == of => Some(*next),
            _ => None,
        }
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Frozen { layer, line, next } = self else {
            return f.write_str(IMAGE);
        };
        let layer = layer.as_ref().map_or(GONE, LayerId::as_str);
        match next {
            Next::Head(number) => write!(f, "{layer}.{line}.{number}"),
            Next::End => write!(f, "{layer}.{line}.{END}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn root() -> Root {
        let instance = Instance::of_data_directory(Path::new("/var/lib/icebox"));
        Root::new("tank/icebox", &instance).unwrap()
    }

    #[test]
    fn names_parse_back_and_nothing_else_does() {
        let root = root();
        let digest = Digest::from_bytes([7; 32]);
        let line = Line(HeadId {
            sandbox: SandboxId::random(),
            number: 3,
        });
        let volumes = [
            Volume::Base(digest.clone()),
            Volume::Import(digest.clone()),
            Volume::Head(line.clone()),
            Volume::Kept(line.clone()),
            Volume::KeptBase(digest),
            Volume::Probe(1234, 1),
        ];
        let frozen = |layer, next| Snapshot::Frozen {
            layer,
            line: line.clone(),
            next,
        };
        let snapshots = [
            Snapshot::Image,
            frozen(Some(LayerId::random()), Next::Head(4)),
            frozen(None, Next::Head(u32::MAX)),
            frozen(Some(LayerId::random()), Next::End),
        ];
        for volume in &volumes {
            let name = root.volume(volume);
            assert_eq!(root.parse_volume(&name).as_ref(), Some(volume), "{name}");
            for snapshot in &snapshots {
                let name = root.snapshot(volume, snapshot);
                assert_eq!(
                    root.parse_snapshot(&name),
                    Some((volume.clone(), snapshot.clone()))
                );
            }
        }
        let sandbox = &line.0.sandbox;
        for foreign in [
            "tank/icebox".to_owned(),
            "tank/icebox/1596b0".to_owned(),
            "tank/icebox/1596b0/data".to_owned(),
            format!("tank/icebox/1596b1/head-{sandbox}-1"),
            format!("tank/icebox/1596b0x/head-{sandbox}-1"),
            format!("tank/icebox/1596b0/head-{sandbox}-01"),
            format!("tank/icebox/1596b0/head-{sandbox}"),
            format!("tank/icebox/1596b0/head-{sandbox}-1/below"),
        ] {
            assert_eq!(root.parse_volume(&foreign), None, "{foreign}");
        }
        for foreign in ["autosnap_2026-01-01", "gone.x.1", "image.", ""] {
            assert_eq!(Snapshot::parse(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn inv_41_what_is_no_dataset_is_refused() {
        let instance = Instance::of_data_directory(Path::new("/var/lib/icebox"));
        let long = format!("tank/{}", "x".repeat(150));
        for bad in [
            "", "/", "tank/", "/tank", "tank//x", "-r", "tank/-x", "tank/a b", "tank@x",
            "tank/a%b", "tank/..", "tank/é", &long,
        ] {
            let error = Root::new(bad, &instance).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{bad}");
        }
        for good in ["tank", "tank/icebox", "rpool/a-b_c.d:e/2"] {
            assert!(Root::new(good, &instance).is_ok(), "{good}");
        }
    }

    #[test]
    fn the_longest_name_fits() {
        let instance = Instance::of_data_directory(Path::new("/var/lib/icebox"));
        let longest = "x".repeat(NAME_MAX - BELOW_MAX - 1 - instance.as_str().len());
        let root = Root::new(&longest, &instance).unwrap();
        let line = Line(HeadId {
            sandbox: SandboxId::random(),
            number: u32::MAX,
        });
        let snapshot = Snapshot::Frozen {
            layer: Some(LayerId::random()),
            line: line.clone(),
            next: Next::Head(u32::MAX),
        };
        let name = root.snapshot(&Volume::Kept(line), &snapshot);
        assert_eq!(name.len(), NAME_MAX);
        Root::new(&format!("{longest}x"), &instance).unwrap_err();
    }
}
