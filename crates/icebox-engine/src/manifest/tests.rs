use super::*;
use crate::id::LayerId;

fn object() -> Object {
    Object::Layer("laaaaaaaaaaaaaaaaaaaa".parse().unwrap())
}

#[test]
fn inv_44_a_newer_format_is_refused_naming_both_versions() {
    let bytes = br#"{"format":9,"writer":"icebox 7.1.0","revision":1,"payload":{"anything":[]}}"#;
    let error = decode::<v1::Layer>(&object(), Some(bytes)).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("format 9") && text.contains("icebox 7.1.0") && text.contains(&this_build()),
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

/// Manifests as format 1 has them: with the fields that it had first, and with what it has gained.
const FIXTURES: [(&str, &[u8]); 5] = [
    ("sandbox", include_bytes!("fixtures/v1-sandbox.json")),
    ("sandbox", include_bytes!("fixtures/v1-sandbox-gained.json")),
    ("layer", include_bytes!("fixtures/v1-layer.json")),
    ("generation", include_bytes!("fixtures/v1-generation.json")),
    ("template", include_bytes!("fixtures/v1-template.json")),
];

/// Reads a manifest and writes it again.
fn again(kind: &str, bytes: &[u8]) -> Result<Vec<u8>, ManifestError> {
    fn through<T: Document>(bytes: &[u8]) -> Result<Vec<u8>, ManifestError> {
        decode::<T>(&object(), Some(bytes)).map(|(revision, payload)| encode(revision, &payload))
    }
    match kind {
        "sandbox" => through::<v1::Sandbox>(bytes),
        "layer" => through::<v1::Layer>(bytes),
        "generation" => through::<v1::Generation>(bytes),
        _ => through::<v1::Template>(bytes),
    }
}

fn json(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap()
}

/// So a build that knows less goes on reading what says nothing that it does not know.
#[test]
fn inv_44_what_says_nothing_new_is_written_as_it_was_when_the_format_was_new() {
    for (kind, bytes) in FIXTURES {
        let written = again(kind, bytes).unwrap();
        assert_eq!(json(&written)["payload"], json(bytes)["payload"], "{kind}");
    }
}

/// Where there are objects whose keys are fields, and not a user's own words.
fn objects(value: &Value, at: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            found.push(at.to_owned());
            for (key, value) in fields {
                if !["env", "metadata"].contains(&key.as_str()) {
                    objects(value, &format!("{at}/{key}"), found);
                }
            }
        }
        Value::Array(items) => {
            for (n, value) in items.iter().enumerate() {
                objects(value, &format!("{at}/{n}"), found);
            }
        }
        _ => {}
    }
}

#[test]
fn inv_44_a_field_that_is_not_known_is_refused_wherever_it_is_and_never_dropped() {
    let mut places = 0;
    for (kind, bytes) in FIXTURES {
        let mut whole = json(bytes);
        whole["writer"] = "icebox 7.1.0".into();
        let mut found = Vec::new();
        objects(&whole["payload"], "/payload", &mut found);
        for place in &found {
            let tampered = |key: &str, says: Value| {
                let mut tampered = whole.clone();
                tampered.pointer_mut(place).unwrap()[key] = says;
                again(kind, &serde_json::to_vec(&tampered).unwrap())
            };
            for says in [
                1.into(),
                "".into(),
                true.into(),
                serde_json::json!({"a": [7]}),
            ] {
                // What stands for one of several things is damaged by a second.
                let error = tampered("unheard_of", says).unwrap_err();
                let text = error.to_string();
                let names_both = text.contains("icebox 7.1.0") && text.contains(&this_build());
                let is_choice = matches!(error, ManifestError::Damaged { .. });
                assert!(
                    text.contains("unheard_of") && names_both
                        || is_choice && (place.ends_with("/over") || place.ends_with("/to")),
                    "{kind} {place}: {text}"
                );
            }
            if !(place.ends_with("/over") || place.ends_with("/to")) {
                for nothing in [
                    Value::Null,
                    false.into(),
                    serde_json::json!([]),
                    serde_json::json!({}),
                ] {
                    tampered("unheard_of", nothing).unwrap();
                }
            }
        }
        places += found.len();
    }
    assert!(places > 40, "{places}");
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
