//! Format 1. Frozen once released: a change of meaning is a new format, with a conversion from this one.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::Document;
use crate::host::{Egress, ProcessIdentity, SavedMemory, SavedPages, Secret, VmmIdentity};
use crate::id::{
    Digest, GenerationNo, HeadId, LayerId, MemoryId, Name, ParseIdError, SandboxId, Slot, Team,
    TemplateId,
};
use crate::unit::{Bytes, Geometry};

/// An immutable disk state that something can sit on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Under {
    /// An imported image.
    Base(Digest),
    /// A layer.
    Layer(LayerId),
}

/// An imported image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// SHA-256 of the image.
    pub digest: Digest,
    /// The image's length.
    pub size: Bytes,
    /// When it was imported.
    pub created_at: Timestamp,
}

/// An immutable disk state: what it shows never changes. What it needs to show it may, when the layers under it are
/// merged into one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Its id.
    pub id: LayerId,
    /// The driver whose format its data has.
    pub driver: String,
    /// The layer that its data needs, if it needs one. A merge replaces it by one that shows the same.
    pub parent: Option<LayerId>,
    /// The base at the bottom, if its data needs one.
    pub base: Option<Digest>,
    /// Size of the disk that the guest sees.
    pub size: Bytes,
    /// When it was frozen, or merged.
    pub created_at: Timestamp,
}

/// An immutable guest memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Its id.
    pub id: MemoryId,
    /// Full, or a diff.
    pub pages: SavedPages,
    /// For a diff: the memory whose base it is against. That one is full.
    pub against: Option<MemoryId>,
    /// The guest's memory size.
    pub size: Bytes,
    /// When it was saved.
    pub created_at: Timestamp,
}

/// What a guest runs on. Everything that a saved state depends on, recorded when the guest booted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The VMM and how it was configured.
    pub vmm: VmmIdentity,
    /// CPUs and memory.
    pub geometry: Geometry,
    /// The kernel that the guest booted.
    pub kernel: Digest,
    /// The agent that runs in it.
    pub agent: Digest,
}

/// One instant of a guest: memory, devices and disk. The device state lies beside the manifest that this is part of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capture {
    /// The disk.
    pub layer: LayerId,
    /// The memory.
    pub memory: MemoryId,
    /// What the guest ran on.
    pub machine: Machine,
    /// Which sandbox the guest was.
    pub sandbox: SandboxId,
    /// The token that its agent accepts.
    pub token: Secret,
    /// What the save wrote.
    pub saved: SavedMemory,
    /// When the guest stood still.
    pub captured_at: Timestamp,
}

/// What wrote a generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, strum::Display)]
#[serde(rename_all = "kebab-case")]
#[strum(serialize_all = "kebab-case")]
pub enum MadeBy {
    /// A pause.
    #[default]
    Pause,
    /// A checkpoint: the guest ran on.
    Checkpoint,
    /// A fork of the sandbox, which ran on: its forks began with it.
    Fork,
    /// The sandbox's creation, of a snapshot template or as a fork.
    Create,
}

impl MadeBy {
    fn is_pause(&self) -> bool {
        *self == Self::Pause
    }
}

/// One instant of a sandbox: what a pause wrote, or a capture while it ran on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generation {
    /// Its number within the sandbox.
    pub number: GenerationNo,
    /// What wrote it.
    #[serde(default, skip_serializing_if = "MadeBy::is_pause")]
    pub made_by: MadeBy,
    /// The generation that the guest had gone on from, which may not be listed any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<GenerationNo>,
    /// The instant it holds.
    pub capture: Capture,
}

/// What a template holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum TemplateContent {
    /// Disk only: cold boot.
    Image {
        /// The disk.
        base: Digest,
    },
    /// Disk, memory and devices: restore.
    Snapshot {
        /// The instant it holds.
        capture: Box<Capture>,
    },
}

/// What sandboxes are created from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Template {
    /// Its id.
    pub id: TemplateId,
    /// Its name within its team.
    pub name: Name,
    /// Whose it is.
    #[serde(default, skip_serializing_if = "Team::is_default")]
    pub team: Team,
    /// Whether every team may create sandboxes from it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub public: bool,
    /// What it holds.
    pub content: TemplateContent,
    /// Geometry of sandboxes that do not ask for another. A snapshot allows no other.
    pub geometry: Geometry,
    /// Size of the disk.
    pub disk_size: Bytes,
    /// The kernel to boot.
    pub kernel: Digest,
    /// Variables for every command in sandboxes made from it.
    pub env: BTreeMap<String, String>,
    /// Who runs commands in sandboxes made from it, and where.
    #[serde(default, skip_serializing_if = "Login::says_nothing")]
    pub login: Login,
    /// Where it came from, in words.
    pub source: String,
    /// When it was made.
    pub created_at: Timestamp,
    /// How many sandboxes made from it wait for somebody to create one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub warm: u16,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks like that")]
fn is_zero(number: &u16) -> bool {
    *number == 0
}

/// Who runs commands that name nobody, and where. What it does not say is the guest's to say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Login {
    /// The user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The directory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub workdir: Option<String>,
}

impl Login {
    fn says_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// Who may talk to a sandbox, apart from the rule: its agent to who has its token, its other ports to anybody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Doors {
    /// Its agent serves whoever knows the sandbox's id.
    #[serde(default)]
    pub agent_open: bool,
    /// Its other ports serve only who has a token for them.
    #[serde(default)]
    pub ports_closed: bool,
}

impl Doors {
    fn are_as_usual(&self) -> bool {
        *self == Self::default()
    }
}

/// What a sandbox was asked to be. Fixed for its life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spec {
    /// Whose it is.
    #[serde(default, skip_serializing_if = "Team::is_default")]
    pub team: Team,
    /// The template that it was created from.
    pub template: TemplateId,
    /// That template's name when it was.
    pub template_name: String,
    /// CPUs and memory.
    pub geometry: Geometry,
    /// Size of the disk.
    pub disk_size: Bytes,
    /// The volume driver, recorded: never chosen again.
    pub volume_driver: String,
    /// The VMM, recorded: never chosen again.
    pub vmm: String,
    /// The kernel to boot.
    pub kernel: Digest,
    /// What it may reach.
    pub egress: Egress,
    /// Variables for every command.
    pub env: BTreeMap<String, String>,
    /// Who runs its commands, and where.
    #[serde(default, skip_serializing_if = "Login::says_nothing")]
    pub login: Login,
    /// Who may talk to it.
    #[serde(default, skip_serializing_if = "Doors::are_as_usual")]
    pub doors: Doors,
    /// The user's own words.
    pub metadata: BTreeMap<String, String>,
    /// What becomes of its past.
    #[serde(default, skip_serializing_if = "HistoryPolicy::says_nothing")]
    pub history: HistoryPolicy,
}

/// What becomes of a sandbox's past. What it does not say is the daemon's to say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HistoryPolicy {
    /// How many of the newest generations are kept, and of the newest branches. At least 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<u32>,
    /// For how long they are kept, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_for_secs: Option<u64>,
    /// How long a guest runs from one automatic checkpoint to the next, in seconds. None are made unless it is said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint_every_secs: Option<u64>,
}

impl HistoryPolicy {
    fn says_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// One host resource that a sandbox has taken, or is about to take.
///
/// Its name on the host derives from the sandbox and what is recorded here, so it can be released by a process that
/// never acquired it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Hold {
    /// The sandbox's directory, and so this manifest.
    Directory,
    /// The network identity.
    Slot,
    /// A writable head.
    Head {
        /// Which head of the sandbox.
        number: u32,
        /// What it sits on.
        over: Under,
    },
    /// The head below it, attached.
    Disk,
    /// Namespace, tap, addresses and rules of the slot.
    Network,
    /// Limits and runtime directory of the VMM.
    Box,
    /// The VMM.
    Vmm {
        /// Known once it has been launched.
        process: Option<ProcessIdentity>,
    },
}

/// Where a sandbox rests, as its manifest says it: the watermark that recovery unwinds to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "phase")]
pub enum Rest {
    /// It is being made, or being destroyed: recovery removes it.
    Nowhere,
    /// Only its disk.
    Stopped,
    /// Its memory is on disk.
    Paused {
        /// Which generation.
        generation: GenerationNo,
    },
    /// A VMM runs it.
    Running,
}

/// An effect that cannot be undone once it has happened, written down before it begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "kind")]
pub enum Intent {
    /// The head becomes `layer`, and head number `to` goes on top of it.
    Freeze {
        /// The layer that the present head becomes.
        layer: LayerId,
        /// The number of the new head.
        to: u32,
    },
    /// The head becomes `layer`, kept as a branch; the sandbox then rests at another point of its history.
    SetAside {
        /// The layer that the present head becomes.
        layer: LayerId,
        /// The name of the branch.
        branch: Name,
        /// Where the sandbox rests afterwards.
        to: Point,
        /// The number of the head that goes on top of that, if it is a branch.
        head: u32,
    },
}

/// A point in a sandbox's history that it can go to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Point {
    /// A generation: memory, devices and disk.
    Generation(GenerationNo),
    /// A branch: a disk.
    Branch(Name),
}

impl fmt::Display for Point {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Generation(number) => write!(f, "generation {number}"),
            Self::Branch(name) => write!(f, "branch {name}"),
        }
    }
}

/// A generation by its number, or a branch by its name. No branch has a number for a name.
impl FromStr for Point {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        match text.parse() {
            Ok(number) => Ok(Self::Generation(GenerationNo(number))),
            Err(_no_number) => text.parse().map(Self::Branch),
        }
    }
}

/// A disk that was set aside, kept by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Branch {
    /// Its name within the sandbox.
    pub name: Name,
    /// Its disk.
    pub layer: LayerId,
    /// The generation that it had gone on from, which may not be listed any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<GenerationNo>,
    /// When it was set aside.
    pub created_at: Timestamp,
}

/// What becomes of a sandbox whose time is over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnTimeout {
    /// It is paused.
    #[default]
    Pause,
    /// It is destroyed.
    Destroy,
    /// It is stopped: its disk is kept.
    Stop,
}

/// When a running sandbox ends by itself, and when a paused one begins to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lifetime {
    /// It ends when nothing has happened in it for so many seconds.
    pub idle_seconds: Option<u64>,
    /// It ends so many seconds after it began to run, whatever happens in it.
    pub run_seconds: Option<u64>,
    /// When that is, of its present run.
    pub end_at: Option<Timestamp>,
    /// When something was known to happen in it. While it runs that is written down from time to time, so it may have
    /// been later.
    pub active_at: Option<Timestamp>,
    /// What becomes of it then.
    pub then: OnTimeout,
    /// Whether a request for it resumes it.
    pub auto_resume: bool,
}

impl Lifetime {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// How a sandbox's VMM last ended without being asked to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// When it was noticed.
    pub at: Timestamp,
    /// Whether the guest asked for it.
    pub by_guest: bool,
    /// For people.
    pub detail: String,
}

/// A sandbox.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// Its id.
    pub id: SandboxId,
    /// Its name within its team, if it has one.
    pub name: Option<Name>,
    /// When it was created.
    pub created_at: Timestamp,
    /// What it was asked to be.
    pub spec: Spec,
    /// What its agent accepts.
    pub token: Secret,
    /// Its network identity, from create to destroy (INV-17).
    pub slot: Slot,
    /// Where it rests.
    pub rests: Rest,
    /// What it holds, oldest first.
    pub holds: Vec<Hold>,
    /// What has begun and cannot be undone.
    pub intent: Option<Intent>,
    /// The guest that runs or is paused, since its boot.
    pub machine: Option<Machine>,
    /// The memory that the running guest was restored from. Kept from the collector while it is mapped.
    pub restored_from: Option<MemoryId>,
    /// The layers that its attached disk was built on, and those it was frozen into since: the VMM, or devices of the
    /// host, have them open. Kept from the collector until the disk is detached, whatever has become of the chain.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub opened: Vec<LayerId>,
    /// Committed generations, oldest first. A generation's directory that is not listed does not exist.
    pub generations: Vec<GenerationNo>,
    /// The generation that its disk is at, or goes on from: made of it last, or gone back to since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub after: Option<GenerationNo>,
    /// The number of the next generation. Never reused, also where a capture failed that was to have it.
    pub next_generation: GenerationNo,
    /// The number of the next head. Never reused.
    pub next_head: u32,
    /// Disks that were set aside.
    pub branches: Vec<Branch>,
    /// When it ends by itself, and when it begins to.
    #[serde(default, skip_serializing_if = "Lifetime::is_default")]
    pub lifetime: Lifetime,
    /// The guest was resumed, and has not answered since: what it has to be told it has not been told.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unwelcomed: bool,
    /// Nobody has asked for it yet: who creates just such a sandbox gets it, and until then nobody sees it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub waits: bool,
    /// How its VMM last ended by itself.
    pub last_exit: Option<Exit>,
    /// Why only inspect and destroy work.
    pub broken: Option<String>,
}

impl Sandbox {
    /// The head that it holds.
    #[must_use]
    pub fn head(&self) -> Option<HeadId> {
        self.holds.iter().find_map(|hold| match hold {
            Hold::Head { number, .. } => Some(HeadId {
                sandbox: self.id.clone(),
                number: *number,
            }),
            _ => None,
        })
    }

    /// The generation to go back to after a crash: the one that its disk goes on from, else the newest.
    #[must_use]
    pub fn last_generation(&self) -> Option<GenerationNo> {
        let listed = |number: &GenerationNo| self.generations.contains(number);
        let newest = self.generations.last().copied();
        self.after.filter(listed).or(newest)
    }
}

impl Document for Base {}
impl Document for Layer {}
impl Document for Memory {}
impl Document for Generation {}
impl Document for Template {}
impl Document for Sandbox {}
