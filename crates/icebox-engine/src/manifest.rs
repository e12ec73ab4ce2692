//! Manifests: what the data directory says about each object, and the rules for reading it.
//!
//! Every manifest is an envelope, `{format, writer, revision, payload}`. The header is parsed alone and first, so a
//! newer format is refused by name, for reading and for writing (INV-44), before anything of the payload is
//! believed. Types under `v1`, `v2`, … are frozen once released; reading converts upward one step at a time.
//! A manifest that cannot be read is an error that names it. It is never treated as empty.

pub mod v1;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

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
    let envelope: Envelope<T> = serde_json::from_slice(bytes).map_err(damaged)?;
    Ok((envelope.revision, envelope.payload))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::LayerId;

    fn object() -> Object {
        Object::Layer("laaaaaaaaaaaaaaaaaaaa".parse().unwrap())
    }

    #[test]
    fn inv_44_a_newer_format_is_refused_naming_both_versions() {
        let bytes =
            br#"{"format":9,"writer":"icebox 7.1.0","revision":1,"payload":{"anything":[]}}"#;
        let error = decode::<v1::Layer>(&object(), Some(bytes)).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("format 9")
                && text.contains("icebox 7.1.0")
                && text.contains(&this_build()),
            "{text}"
        );
    }

    #[test]
    fn damaged_and_missing_manifests_are_errors_that_name_the_object() {
        for bytes in [
            &b""[..],
            b"{",
            b"null",
            b"{\"format\":1,\"writer\":\"x\",\"revision\":1,\"payload\":{}}",
        ] {
            let error = decode::<v1::Layer>(&object(), Some(bytes)).unwrap_err();
            assert!(error.to_string().contains("laaaa"), "{error}");
            assert!(matches!(error, ManifestError::Damaged { .. }), "{error:?}");
        }
        assert!(matches!(
            decode::<v1::Layer>(&object(), None),
            Err(ManifestError::Missing { .. })
        ));
    }

    #[test]
    fn every_released_format_is_still_read() {
        let fixture = include_bytes!("manifest/fixtures/v1-layer.json");
        let (revision, layer) = decode::<v1::Layer>(&object(), Some(fixture)).unwrap();
        assert_eq!((revision, layer.driver.as_str()), (3, "qcow2"));
        let fixture = include_bytes!("manifest/fixtures/v1-sandbox.json");
        let (_, sandbox) = decode::<v1::Sandbox>(&object(), Some(fixture)).unwrap();
        assert_eq!(sandbox.holds.len(), 7);
        assert_eq!(
            decode::<v1::Sandbox>(&object(), Some(&encode(4, &sandbox))).unwrap(),
            (4, sandbox)
        );
    }

    #[test]
    fn what_is_written_is_read_back() {
        let layer = v1::Layer {
            id: LayerId::random(),
            driver: "reflink".into(),
            parent: None,
            base: None,
            size: crate::unit::Bytes::mib(1),
            created_at: jiff::Timestamp::UNIX_EPOCH,
        };
        assert_eq!(
            decode::<v1::Layer>(&object(), Some(&encode(7, &layer))).unwrap(),
            (7, layer)
        );
    }
}
