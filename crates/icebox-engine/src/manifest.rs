//! Manifests: what the data directory says about each object, and the rules for reading it.
//!
//! Every manifest is an envelope, `{format, writer, revision, payload}`. The header is parsed alone and first, so a
//! newer format is refused by name, for reading and for writing (INV-44), before anything of the payload is
//! believed. Types under `v1`, `v2`, … are frozen once released; reading converts upward one step at a time.
//!
//! A format may gain a field that says nothing where it is absent, and is absent where it says nothing. A build that does
//! not know the field reads every manifest that does without it, and refuses those that have it: what it writes back would
//! lack the field (`docs/decisions/manifests.md`).
//! A manifest that cannot be read is an error that names it. It is never treated as empty.

pub mod v1;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::layout::Object;

/// The format that this build writes.
pub const FORMAT: u32 = 1;

/// Why a manifest cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Written by a version that this one does not know.
    #[error(
        "the manifest of {object} has format {found}, written by {writer}; this build, {}, reads up to {FORMAT}",
        this_build()
    )]
    TooNew {
        /// Whose manifest.
        object: Object,
        /// Its format.
        found: u32,
        /// Who wrote it.
        writer: String,
    },
    /// Of a format that this build reads, with something in it that this build does not know.
    #[error(
        "the manifest of {object}, written by {writer}, has {field}, which this build, {}, does not know",
        this_build()
    )]
    Unknown {
        /// Whose manifest.
        object: Object,
        /// Who wrote it.
        writer: String,
        /// Where it is in the payload.
        field: String,
    },
    /// Not what its format says.
    #[error("the manifest of {object} is damaged")]
    Damaged {
        /// Whose manifest.
        object: Object,
        /// Where parsing stopped.
        source: serde_json::Error,
    },
    /// The directory has no manifest.
    #[error("{object} has no manifest")]
    Missing {
        /// Whose manifest.
        object: Object,
    },
}

/// A payload that lives in a manifest of its own.
pub trait Document: Serialize + DeserializeOwned {}

/// Name and version of this build: who writes, as it stands in every manifest.
#[must_use]
pub fn this_build() -> String {
    concat!("icebox ", env!("CARGO_PKG_VERSION")).to_owned()
}

/// Writes only what is known to be needed before the payload's type is.
#[derive(Deserialize)]
struct Header {
    format: u32,
    writer: String,
}

#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
struct Envelope<T> {
    format: u32,
    writer: String,
    revision: u64,
    payload: T,
}

/// The bytes of a manifest. `revision` counts the commits of this object.
///
/// # Panics
/// If a document cannot be represented in JSON, which none of ours allows.
#[must_use]
pub fn encode<T: Document>(revision: u64, payload: &T) -> Vec<u8> {
    #[derive(Serialize)]
    struct Borrowed<'a, T> {
        format: u32,
        writer: String,
        revision: u64,
        payload: &'a T,
    }
    let envelope = Borrowed {
        format: FORMAT,
        writer: this_build(),
        revision,
        payload,
    };
    let mut bytes = serde_json::to_vec_pretty(&envelope).expect("documents are plain data");
    bytes.push(b'\n');
    bytes
}

/// Reads a manifest: its revision and payload.
///
/// # Errors
/// The manifest is missing, damaged, or newer than this build.
pub fn decode<T: Document>(
    object: &Object,
    bytes: Option<&[u8]>,
) -> Result<(u64, T), ManifestError> {
    let bytes = bytes.ok_or_else(|| ManifestError::Missing {
        object: object.clone(),
    })?;
    let damaged = |source| ManifestError::Damaged {
        object: object.clone(),
        source,
    };
    let header: Header = serde_json::from_slice(bytes).map_err(damaged)?;
    if header.format != FORMAT {
        return Err(ManifestError::TooNew {
            object: object.clone(),
            found: header.format,
            writer: header.writer,
        });
    }
    let envelope: Envelope<Value> = serde_json::from_slice(bytes).map_err(damaged)?;
    let payload = T::deserialize(&envelope.payload).map_err(damaged)?;
    let known = serde_json::to_value(&payload).map_err(damaged)?;
    match beyond(&envelope.payload, &known) {
        Some(field) => Err(ManifestError::Unknown {
            object: object.clone(),
            writer: envelope.writer,
            field: format!("payload{field}"),
        }),
        None => Ok((envelope.revision, payload)),
    }
}

/// Where `said` says something that is lost in `known`, which is what was understood of it.
fn beyond(said: &Value, known: &Value) -> Option<String> {
    let nothing = &Value::Null;
    match said {
        Value::Object(said) => said.iter().find_map(|(key, said)| {
            let known = known.get(key).unwrap_or(nothing);
            Some(format!(".{key}{}", beyond(said, known)?))
        }),
        Value::Array(said) => said.iter().enumerate().find_map(|(at, said)| {
            let known = known.get(at).unwrap_or(nothing);
            Some(format!("[{at}]{}", beyond(said, known)?))
        }),
        // What is absent says as much.
        Value::Null | Value::Bool(false) => None,
        Value::Bool(true) | Value::Number(_) | Value::String(_) => {
            known.is_null().then(String::new)
        }
    }
}

#[cfg(test)]
mod tests;
