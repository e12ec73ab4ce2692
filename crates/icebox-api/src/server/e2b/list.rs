//! `GET /v2/sandboxes`: those that run and those that are paused, the newest first, in pages.

use axum::extract::RawQuery;
use axum::response::Response;
use http::HeaderValue;
use percent_encoding::percent_decode_str;

use super::form;
use super::page::{Asked, Position};
use crate::server::Context;
use crate::types::{SandboxDetail, SandboxQuery, State as SandboxState};
use crate::{ApiError, ErrorCode};

pub(in crate::server) async fn list(
    context: Context,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let (wanted, page) = parse(query.as_deref().unwrap_or_default())?;
    let all = context.daemon.list(false).await?;
    let is_running = |it: &&SandboxDetail| it.listed.state == SandboxState::Running;
    let running = all.iter().filter(is_running).count();
    let fitting = all.into_iter().filter_map(|mut sandbox| {
        // E2B's lists have none.
        sandbox.envd_access_token = None;
        sandbox.traffic_access_token = None;
        let at = Position::new(sandbox.listed.started_at, &sandbox.listed.sandbox_id);
        fits(&wanted, &sandbox).then(|| {
            form::put(&mut sandbox);
            (at, sandbox)
        })
    });
    let mut answer = page.of(fitting.collect(), wanted.ascending);
    let running = HeaderValue::from(running);
    answer.headers_mut().insert("x-total-running", running);
    Ok(answer)
}

fn fits(wanted: &SandboxQuery, sandbox: &SandboxDetail) -> bool {
    let listed = &sandbox.listed;
    // One that is being made or removed rests nowhere, which shows as stopped.
    let is_there = !matches!(listed.verb.as_deref(), Some("creating" | "destroying"));
    let has = |(key, value): &(String, String)| listed.metadata.get(key) == Some(value);
    is_there
        && wanted.states.contains(&form::state(listed.state))
        && wanted.metadata.iter().all(has)
        && wanted
            .started_after
            .is_none_or(|after| listed.started_at > after)
        && wanted.template.as_ref().is_none_or(|template| {
            *template == listed.template_id || Some(template) == listed.alias.as_ref()
        })
}

fn parse(query: &str) -> Result<(SandboxQuery, Asked), ApiError> {
    let mut wanted = SandboxQuery {
        metadata: Vec::new(),
        states: Vec::new(),
        started_after: None,
        template: None,
        ascending: false,
    };
    let mut page = Asked::default();
    let invalid =
        |name: &str, value: &str| ApiError::new(ErrorCode::Invalid, format!("{name} is {value:?}"));
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        match &*name {
            "metadata" => wanted.metadata.extend(metadata(&value)),
            "state" => {
                for state in value.split(',').filter(|state| !state.is_empty()) {
                    wanted.states.push(match state {
                        "running" => SandboxState::Running,
                        "paused" => SandboxState::Paused,
                        _ => return Err(invalid("state", state).hint("ask for running or paused")),
                    });
                }
            }
            "order" => {
                wanted.ascending = match &*value {
                    "asc" => true,
                    "desc" => false,
                    _ => return Err(invalid("order", &value).hint("ask for asc or desc")),
                };
            }
            "startedAfter" => {
                let after = value.parse().map_err(|_| invalid("startedAfter", &value))?;
                wanted.started_after = Some(after);
            }
            "template" => wanted.template = Some(value.into_owned()),
            _ => page.take(&name, &value)?,
        }
    }
    if wanted.states.is_empty() {
        wanted.states = vec![SandboxState::Running, SandboxState::Paused];
    }
    Ok((wanted, page))
}

/// Labels as SDKs send them: each key and value encoded, then all of them as a query, then that as a query's value. What
/// is given here has lost the last layer.
fn metadata(value: &str) -> Vec<(String, String)> {
    let whole = unescape(value);
    let pairs = whole.split('&').filter(|pair| !pair.is_empty());
    pairs
        .map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (unescape(key), unescape(value))
        })
        .collect()
}

fn unescape(text: &str) -> String {
    let text = text.replace('+', " ");
    percent_decode_str(&text).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_read_through_all_their_layers() {
        let (wanted, _) = parse("metadata=a%252520b%3Dc%25253Dd%26k%3Dv").expect("understood");
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        assert_eq!(wanted.metadata, [pair("a b", "c=d"), pair("k", "v")]);
    }

    #[test]
    fn states_come_in_one_parameter_and_unknown_ones_are_refused() {
        let both = [SandboxState::Running, SandboxState::Paused];
        for query in [
            "",
            "state=running%2Cpaused",
            "state=running,paused",
            "state=running&state=paused",
        ] {
            let (wanted, _) = parse(query).expect("understood");
            assert_eq!(wanted.states, both, "{query}");
        }
        for query in ["state=gone", "order=up", "startedAfter=soon", "limit=many"] {
            assert!(parse(query).is_err(), "{query}");
        }
    }
}
