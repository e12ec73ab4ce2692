//! What the benchmark asks of its daemon's sandboxes.

use std::time::Instant;

use serde_json::{Value, json};

use super::daemon::Daemon;
use super::{MEMORY_MIB, array, float, ms, text};
use crate::run::Failure;

pub(super) fn create(
    daemon: &Daemon,
    template: &str,
    memory_mib: Option<u64>,
) -> Result<String, Failure> {
    let is_snapshot = template == "bench-0";
    let memory = memory_mib.or((!is_snapshot).then_some(MEMORY_MIB));
    let made = daemon.post(
        "/sandboxes",
        &json!({"templateID": template, "memoryMB": memory}),
    )?;
    Ok(text(&made["sandboxID"]))
}

pub(super) fn inspect(daemon: &Daemon, sandbox: &str) -> Result<Value, Failure> {
    daemon.request("GET", &format!("/sandboxes/{sandbox}"), &Value::Null)
}

pub(super) fn post(
    daemon: &Daemon,
    sandbox: &str,
    what: &str,
    body: &Value,
) -> Result<Value, Failure> {
    daemon.post(&format!("/sandboxes/{sandbox}/{what}"), body)
}

pub(super) fn verb(daemon: &Daemon, sandbox: &str, verb: &str) -> Result<(), Failure> {
    post(daemon, sandbox, verb, &json!({})).map(drop)
}

pub(super) fn pause(daemon: &Daemon, sandbox: &str) -> Result<f64, Failure> {
    let begun = Instant::now();
    verb(daemon, sandbox, "pause")?;
    Ok(ms(begun))
}

pub(super) fn destroy(daemon: &Daemon, sandbox: &str) -> Result<(), Failure> {
    daemon
        .request("DELETE", &format!("/sandboxes/{sandbox}"), &Value::Null)
        .map(drop)
}

/// What the steps of a sandbox's newest event took, in ms: where its time went.
pub(super) fn last_steps(daemon: &Daemon, sandbox: &str) -> Result<String, Failure> {
    let events = daemon.request("GET", "/events?follow=false&since=0", &Value::Null)?;
    let mut newest = array(&events).iter().rev();
    let newest = newest.find(|event| event["sandboxID"] == sandbox && event["steps"].is_array());
    let steps = newest
        .map_or(&[][..], |event| array(&event["steps"]))
        .iter();
    let steps = steps.map(|step| {
        let took = float(&step["micros"]) / 1000.0;
        format!("{} {took:.0}", text(&step["step"]))
    });
    Ok(steps.collect::<Vec<_>>().join(", "))
}

/// For how long the vCPUs stood still in a sandbox's newest snapshot, from the times of its steps.
pub(super) fn last_downtime(daemon: &Daemon, sandbox: &str) -> Result<f64, Failure> {
    let events = daemon.request("GET", "/events?follow=false&since=0", &Value::Null)?;
    let step = |event: &Value, name: &str| {
        array(&event["steps"])
            .iter()
            .find(|step| step["step"] == name)
            .map(|step| float(&step["micros"]))
    };
    array(&events)
        .iter()
        .rev()
        .filter(|event| event["sandboxID"] == sandbox)
        .find_map(|event| {
            let still = ["pause-vcpus", "save", "freeze", "resume-vcpus"];
            let still = still.iter().map(|name| step(event, name));
            // Where the host freezes the disk, what it has of it is written out before.
            let flushed = step(event, "flush").unwrap_or_default();
            still.sum::<Option<f64>>().map(|still| still + flushed)
        })
        .map(|micros| micros / 1000.0)
        .ok_or_else(|| Failure("no event tells how long the snapshot took".into()))
}
