//! `docs/conformance.md`: which verbs each VMM has been seen to do with each volume driver.
//!
//! It is written from `docs/conformance.json`, which a recorded run of the test host with the real programs leaves
//! (`cargo xtask test-host --record …`). A pair that has not run with the newest recorded version of its VMM is one that never
//! ran: what another program did says nothing of this one.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use crate::run::Failure;
use crate::soak::today;

/// VMMs and volume drivers, in the order of the table.
const VMMS: [&str; 3] = ["qemu", "cloud-hypervisor", "firecracker"];
const DRIVERS: [&str; 4] = ["dm-snapshot", "zfs", "reflink", "qcow2"];
/// What the tests tell of, as they call it, and the head of its column.
const VERBS: [(&str, &str); 17] = [
    ("create", "create"),
    ("exec", "exec"),
    ("pause", "pause"),
    ("resume", "resume"),
    ("snapshot", "snapshot"),
    ("create from a snapshot", "create from it"),
    ("fork", "fork"),
    ("rollback", "rollback"),
    ("flatten", "flatten"),
    ("stop", "stop"),
    ("start", "start"),
    ("rm", "rm"),
    ("guest off", "guest off"),
    ("guest reset", "guest reset"),
    ("daemon killed", "daemon killed"),
    ("VMM wedged", "VMM wedged"),
    ("VMM killed", "VMM killed"),
];
const BEGIN: &str = "<!-- begin: conformance -->";
const END: &str = "<!-- end: conformance -->";

/// The record with what a run has seen: lines of JSON, each of them of one pair. A pair that ran is recorded anew.
pub(super) fn merged(record: &str, seen: &str) -> Result<String, Failure> {
    let wrong = |what: &dyn std::fmt::Display| Failure(format!("a record of conformance: {what}"));
    let mut record: Map<String, Value> =
        serde_json::from_str(record).map_err(|error| wrong(&error))?;
    let mut begun = BTreeSet::new();
    for line in seen.lines() {
        let line: Value = serde_json::from_str(line).map_err(|error| wrong(&error))?;
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let (Some(vmm), Some(driver)) = (text(&line["vmm"]["name"]), text(&line["driver"])) else {
            return Err(wrong(&line));
        };
        let program = json!({"version": line["vmm"]["version"], "sha256": line["vmm"]["sha256"]});
        let known = record.entry(&*vmm).or_insert(Value::Null);
        if known["program"] != program {
            *known = json!({"program": program, "pairs": {}});
        }
        let pair = &mut known["pairs"][&*driver];
        if begun.insert((vmm, driver)) {
            *pair = json!({
                "date": today()?,
                "accelerator": line["vmm"]["accelerator"],
                "kernel": line["vmm"]["kernel"],
                "verbs": [],
            });
        }
        if line["never"].is_string() {
            *pair = json!({"never": line["never"]});
        }
        let verbs = line["verbs"].as_array().into_iter().flatten();
        if let Some(seen) = pair["verbs"].as_array_mut() {
            seen.extend(verbs.cloned());
        }
    }
    let pretty = serde_json::to_string_pretty(&record).map_err(|error| wrong(&error))?;
    Ok(pretty + "\n")
}

/// The document with the tables of this record.
pub(super) fn written(document: &str, record: &str) -> Result<String, Failure> {
    let wrong = |what: &dyn std::fmt::Display| Failure(format!("docs/conformance: {what}"));
    let record: Value = serde_json::from_str(record).map_err(|error| wrong(&error))?;
    let parts = document
        .split_once(BEGIN)
        .and_then(|(before, rest)| Some((before, rest.split_once(END)?.1)));
    let (before, after) = parts.ok_or_else(|| wrong(&format!("no {BEGIN} … {END}")))?;
    Ok(format!(
        "{before}{BEGIN}\n{}\n{}{END}{after}",
        verbs(&record),
        programs(&record)
    ))
}

fn verbs(record: &Value) -> String {
    let heads: Vec<_> = VERBS.iter().map(|(_, head)| *head).collect();
    let mut table = format!(
        "| VMM | volume driver | {} |\n|---|---|{}\n",
        heads.join(" | "),
        "---|".repeat(VERBS.len())
    );
    for vmm in VMMS {
        for driver in DRIVERS {
            let pair = &record[vmm]["pairs"][driver];
            let cells: Vec<_> = VERBS.iter().map(|(verb, _)| cell(pair, verb)).collect();
            table.push_str(&format!("| {vmm} | {driver} | {} |\n", cells.join(" | ")));
        }
    }
    table
}

fn cell(pair: &Value, verb: &str) -> &'static str {
    match &pair["verbs"] {
        Value::Array(seen) if seen.iter().any(|it| it == verb) => "✓",
        Value::Array(_) => "not seen",
        _ if pair["never"].is_string() => "—",
        _ => "never run",
    }
}

fn programs(record: &Value) -> String {
    let mut table = "| VMM | version | SHA-256 of the program | volume driver | run | accelerator | host kernel |\n|---|---|---|---|---|---|---|\n".to_owned();
    for vmm in VMMS {
        let known = &record[vmm];
        for driver in DRIVERS {
            let pair = &known["pairs"][driver];
            let text = |value: &Value| value.as_str().unwrap_or("—").to_owned();
            let run = match (&pair["date"], &pair["never"]) {
                (Value::String(date), _) => date.clone(),
                (_, Value::String(why)) => why.clone(),
                _ => "never run".to_owned(),
            };
            table.push_str(&format!(
                "| {vmm} | {} | `{}` | {driver} | {run} | {} | {} |\n",
                text(&known["program"]["version"]),
                text(&known["program"]["sha256"]),
                text(&pair["accelerator"]),
                text(&pair["kernel"]),
            ));
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(version: &str, driver: &str, verb: &str) -> String {
        let vmm = json!({"name": "qemu", "version": version, "sha256": "5", "accelerator": "kvm", "kernel": "6"});
        format!(
            "{}\n",
            json!({"vmm": vmm, "driver": driver, "verbs": [verb]})
        )
    }

    #[test]
    fn a_pair_is_recorded_anew_and_another_version_forgets_all() {
        let first = merged(
            "{}",
            &(line("1", "zfs", "pause") + &line("1", "zfs", "exec")),
        )
        .unwrap();
        let both = merged(&first, &line("1", "reflink", "pause")).unwrap();
        let shown = written(&format!("{BEGIN}{END}\n"), &both).unwrap();
        let row = |driver: &str| {
            let start = format!("| qemu | {driver} |");
            let row = shown.lines().find(|line| line.starts_with(&start));
            row.unwrap().matches('✓').count()
        };
        assert_eq!((row("zfs"), row("reflink"), row("qcow2")), (2, 1, 0));
        assert!(
            shown.contains("| firecracker | zfs | never run |"),
            "{shown}"
        );

        let again = merged(&both, &line("1", "zfs", "pause")).unwrap();
        assert_eq!(again.matches("pause").count(), 2, "{again}");
        assert_eq!(again.matches("exec").count(), 0, "{again}");
        let newer = merged(&both, &line("2", "zfs", "pause")).unwrap();
        assert_eq!(newer.matches("pause").count(), 1, "{newer}");
    }
}
