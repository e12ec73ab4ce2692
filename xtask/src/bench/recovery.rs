//! How long a daemon takes to start over many paused sandboxes.
//!
//! Pausing hundreds of guests would take as many seconds. One is paused, and what it left is copied, each copy with
//! manifests of its own: sandbox, generation, layer and memory. Files that never change are linked.

use std::fs;
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use super::daemon::Daemon;
use super::guests::{create, destroy, pause, verb};
use super::report::{Budget, Report, Row};
use super::{array, ms, text};
use crate::run::Failure;

const PAUSED: usize = 500;
const AT_MOST_MS: f64 = 1000.0;
const MANIFEST: &str = "manifest.json";

pub(super) fn recovery(daemon: &mut Daemon, report: &mut Report) -> Result<(), Failure> {
    eprintln!("\n── {PAUSED} paused sandboxes");
    let sandbox = create(daemon, "bench-0", None)?;
    pause(daemon, &sandbox)?;
    // Whatever the last verbs left to do in the background.
    daemon.restart("")?;
    daemon.end()?;
    let begun = Instant::now();
    daemon.start_again("")?;
    let one = ms(begun);
    daemon.end()?;
    let record = read(&daemon.data.join("sandboxes").join(&sandbox).join(MANIFEST))?;
    let slot = record["payload"]["slot"].as_u64().unwrap_or_default();
    for number in 1..PAUSED {
        copy(&daemon.data, &sandbox, slot, number)?;
    }
    let begun = Instant::now();
    daemon.start_again("")?;
    let took = ms(begun);
    let listed = daemon.request("GET", "/sandboxes", &Value::Null)?;
    let paused = array(&listed)
        .iter()
        .filter(|sandbox| sandbox["state"] == "paused");
    let paused: Vec<String> = paused.map(|it| text(&it["sandboxID"])).collect();
    if paused.len() != PAUSED {
        return Err(Failure(format!(
            "{} sandboxes are paused, and {PAUSED} were to be",
            paused.len()
        )));
    }
    // They are what they look like.
    if let Some(copy) = paused.iter().find(|id| **id != sandbox) {
        verb(daemon, copy, "resume")?;
        daemon.exec_true(copy)?;
    }
    for sandbox in &paused {
        destroy(daemon, sandbox)?;
    }
    report.add(
        Row::new("daemon's start over 500 paused sandboxes", "ms", took)
            .budget(Budget::AtMost(AT_MOST_MS))
            .note(format!("to its first answer; {one:.0} ms over one of them")),
    );
    Ok(())
}

fn read(path: &Path) -> Result<Value, Failure> {
    let failed =
        |error: &dyn std::fmt::Display| Failure(format!("read {}: {error}", path.display()));
    let bytes = fs::read(path).map_err(|error| failed(&error))?;
    serde_json::from_slice(&bytes).map_err(|error| failed(&error))
}

/// An id like `id`, that is no other's.
fn other(id: &str, number: usize) -> String {
    let digits = format!("{number:06}");
    format!("{}{digits}", &id[..id.len() - digits.len()])
}

/// Copies a paused sandbox, its generations, and the layers and memories that they name.
fn copy(data: &Path, sandbox: &str, slot: u64, number: usize) -> Result<(), Failure> {
    let (from, to) = (
        data.join("sandboxes").join(sandbox),
        data.join("sandboxes").join(other(sandbox, number)),
    );
    let generations = from.join("generations");
    let mut renamed = vec![sandbox.to_owned()];
    for generation in super::files::entries(&generations)? {
        let capture = read(&generation.join(MANIFEST))?["payload"]["capture"].clone();
        for (area, key) in [("layers", "layer"), ("memories", "memory")] {
            let id = text(&capture[key]);
            let copy = other(&id, number);
            if !data.join(area).join(&copy).exists() {
                link(
                    &data.join(area).join(&id),
                    &data.join(area).join(&copy),
                    &|text| text.replace(&id, &copy),
                )?;
            }
            renamed.push(id);
        }
    }
    link(&from, &to, &|text| {
        let changed = renamed.iter().fold(text.to_owned(), |text, id| {
            text.replace(id.as_str(), &other(id, number))
        });
        match serde_json::from_str::<Value>(&changed) {
            Ok(mut document) if document["payload"]["slot"].is_u64() => {
                document["payload"]["slot"] = json!(slot + number as u64);
                document.to_string()
            }
            _ => changed,
        }
    })
}

/// A directory like another: links to its files, and manifests of its own.
fn link(from: &Path, to: &Path, manifest: &dyn Fn(&str) -> String) -> Result<(), Failure> {
    let at = |what: &str, path: &Path, error: std::io::Error| {
        Failure(format!("{what} {}: {error}", path.display()))
    };
    fs::create_dir(to).map_err(|error| at("make", to, error))?;
    for entry in super::files::entries(from)? {
        let name = entry.file_name().unwrap_or_default();
        let copy = to.join(name);
        if entry.is_dir() {
            link(&entry, &copy, manifest)?;
        } else if name == MANIFEST {
            let text = fs::read_to_string(&entry).map_err(|error| at("read", &entry, error))?;
            fs::write(&copy, manifest(&text)).map_err(|error| at("write", &copy, error))?;
        } else {
            fs::hard_link(&entry, &copy).map_err(|error| at("link", &entry, error))?;
        }
    }
    Ok(())
}
