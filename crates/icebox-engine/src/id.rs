//! Ids and names: what may become a path component, a process argument or a label.
//!
//! Every id and name that reaches the engine has been through [`FromStr`] here, so nothing
//! below this point needs to ask again whether a string is safe to join to a path (INV-41).

use std::fmt;
use std::str::FromStr;

use rand::RngExt as _;
use serde::{Deserialize, Serialize};

/// Random characters after an id's prefix: 36^20 is 103 bits, so ids are never checked for collision.
const ID_CHARS: usize = 20;
/// The longest name: leaves room for a suffix in a 64-byte hostname.
const NAME_MAX: usize = 63;

/// Why a string is not an id or a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseIdError {
    /// Not of an id's form.
    #[error(
        "{found:?} is not a {kind} id (expected {prefix:?} and {ID_CHARS} characters a-z, 0-9)"
    )]
    Id {
        /// What the id would name.
        kind: &'static str,
        /// The letter that ids of this kind begin with.
        prefix: char,
        /// What was given, cut to a readable length.
        found: String,
    },
    /// Not of a name's form.
    #[error(
        "{found:?} is not a valid name: use 1 to {NAME_MAX} of a-z, 0-9, '-', '_' and '.', beginning with a letter or digit, without '..'"
    )]
    Name {
        /// What was given, cut to a readable length.
        found: String,
    },
    /// A name of an id's form: `rm` of one sandbox's id would remove the sandbox that is called so.
    #[error("{found:?} cannot be a name: it has the form of an id")]
    NameLikeId {
        /// What was given.
        found: String,
    },
    /// Not a SHA-256 in lower-case hexadecimal.
    #[error("{found:?} is not a digest (expected 64 characters 0-9, a-f)")]
    Digest {
        /// What was given, cut to a readable length.
        found: String,
    },
}

/// What an error repeats of a bad input: enough to recognise it, never a screenful.
fn excerpt(text: &str) -> String {
    text.chars().take(80).collect()
}

/// A random number below `bound`.
fn draw(bound: usize) -> usize {
    #[cfg(feature = "seeded")]
    if let Some(drawn) = seeded::draw(bound) {
        return drawn;
    }
    rand::rng().random_range(0..bound)
}

/// Ids that a test has again when it runs again, since the order of things is that of their ids.
#[cfg(feature = "seeded")]
pub mod seeded {
    use std::cell::RefCell;

    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};

    thread_local! {
        static RNG: RefCell<Option<StdRng>> = const { RefCell::new(None) };
    }

    /// Makes ids of this thread follow from `seed`, from here on.
    pub fn begin(seed: u64) {
        RNG.set(Some(StdRng::seed_from_u64(seed)));
    }

    pub(super) fn draw(bound: usize) -> Option<usize> {
        RNG.with_borrow_mut(|rng| rng.as_mut().map(|rng| rng.random_range(0..bound)))
    }
}

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Makes a new id from the operating system's randomness.
            #[must_use]
            pub fn random() -> Self {
                const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
                let mut id = String::with_capacity(1 + ID_CHARS);
                id.push($prefix);
                id.extend((0..ID_CHARS).map(|_| char::from(ALPHABET[draw(ALPHABET.len())])));
                Self(id)
            }

            /// The id as text: a single safe path component.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = ParseIdError;
            fn from_str(text: &str) -> Result<Self, ParseIdError> {
                let rest = text.strip_prefix($prefix).unwrap_or_default();
                if rest.len() == ID_CHARS && rest.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(ParseIdError::Id { kind: $kind, prefix: $prefix, found: excerpt(text) })
                }
            }
        }

        string_conversions!($name);
    };
}

macro_rules! string_conversions {
    ($name:ident) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl TryFrom<String> for $name {
            type Error = ParseIdError;
            fn try_from(text: String) -> Result<Self, ParseIdError> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.0
            }
        }
        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }
    };
}

random_id!(
    /// Names a sandbox for its whole life. The form is the one E2B SDKs accept: `^[a-z0-9]+$`.
    SandboxId, "sandbox", 'i'
);
random_id!(
    /// Names a template.
    TemplateId, "template", 't'
);
random_id!(
    /// Names an immutable disk state.
    LayerId, "layer", 'l'
);
random_id!(
    /// Names an immutable guest-memory object.
    MemoryId, "memory", 'm'
);

/// A user's name for a sandbox, template or branch: lower case, one path component, at most 63 bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// The name as text: a single safe path component.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Name {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        let allowed =
            |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.');
        let first_ok = text
            .bytes()
            .next()
            .is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if !first_ok || text.len() > NAME_MAX || !text.bytes().all(allowed) || text.contains("..") {
            return Err(ParseIdError::Name {
                found: excerpt(text),
            });
        }
        if text.parse::<SandboxId>().is_ok() || text.parse::<TemplateId>().is_ok() {
            return Err(ParseIdError::NameLikeId {
                found: text.to_owned(),
            });
        }
        Ok(Self(text.to_owned()))
    }
}
string_conversions!(Name);

/// Whose a sandbox or a template is: a team's name, which is its identity and never changes. The form is a name's.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Team(String);

impl Team {
    /// The team of who names none. Whatever was made before there were teams is its own.
    pub const DEFAULT: &str = "default";

    /// The team's name: a single safe path component.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether it is the team of who names none.
    #[must_use]
    pub fn is_default(&self) -> bool {
        self.0 == Self::DEFAULT
    }
}

impl Default for Team {
    fn default() -> Self {
        Self(Self::DEFAULT.to_owned())
    }
}

impl FromStr for Team {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        text.parse::<Name>().map(|Name(name)| Self(name))
    }
}
string_conversions!(Team);

/// A SHA-256 in lower-case hexadecimal: the name of content-addressed objects (bases, kernels).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// The digest as 64 hexadecimal characters.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The first twelve characters, for people.
    #[must_use]
    pub fn short(&self) -> &str {
        &self.0[..12]
    }

    /// The digest whose 32 bytes are given.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        use fmt::Write as _;
        let mut hex = String::with_capacity(64);
        for byte in bytes {
            write!(hex, "{byte:02x}").expect("writing to a String cannot fail");
        }
        Self(hex)
    }
}

impl FromStr for Digest {
    type Err = ParseIdError;
    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        if text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            Ok(Self(text.to_owned()))
        } else {
            Err(ParseIdError::Digest {
                found: excerpt(text),
            })
        }
    }
}
string_conversions!(Digest);

/// A reserved network identity: an index that addresses and names derive from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Slot(pub u16);

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A pause's number within its sandbox, counted from 1. A sandbox that began as a restore has generation 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct GenerationNo(pub u32);

impl fmt::Display for GenerationNo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One writable top of a sandbox's chain. Numbers are never reused within a sandbox.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct HeadId {
    /// The sandbox that writes to it.
    pub sandbox: SandboxId,
    /// Which of the sandbox's heads it is.
    pub number: u32,
}

impl fmt::Display for HeadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.sandbox, self.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_ids_parse_back() {
        let id = SandboxId::random();
        assert_eq!(id.as_str().parse(), Ok(id.clone()));
        assert!(
            id.as_str().parse::<LayerId>().is_err(),
            "the prefix tells kinds apart"
        );
    }

    #[test]
    fn inv_41_unsafe_names_and_ids_are_refused() {
        let long = "a".repeat(300);
        for bad in [
            "",
            ".",
            "..",
            "a..b",
            "a/b",
            "../a",
            "-a",
            ".a",
            "A",
            "é",
            "a b",
            "a\0b",
            "a\n",
            long.as_str(),
        ] {
            assert!(bad.parse::<Name>().is_err(), "{bad:?} must not be a name");
            assert!(
                bad.parse::<SandboxId>().is_err(),
                "{bad:?} must not be an id"
            );
            assert!(
                bad.parse::<Digest>().is_err(),
                "{bad:?} must not be a digest"
            );
        }
        for like_id in [
            SandboxId::random().to_string(),
            TemplateId::random().to_string(),
        ] {
            assert!(
                like_id.parse::<Name>().is_err(),
                "{like_id:?} must not be a name"
            );
        }
        for good in ["a", "0", "python-3.11", "my_box", "a.b"] {
            assert!(good.parse::<Name>().is_ok(), "{good:?} is a name");
        }
    }

    #[test]
    fn inv_41_a_manifest_cannot_smuggle_a_path_in_an_id() {
        assert!(serde_json::from_str::<SandboxId>("\"../../etc/passwd12345\"").is_err());
        assert!(serde_json::from_str::<Name>("\"a/../b\"").is_err());
    }
}
