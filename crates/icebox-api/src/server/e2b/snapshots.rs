//! `GET /snapshots`: templates that sandboxes were frozen into, the newest first, in pages.

use axum::extract::RawQuery;
use axum::response::Response;

use super::page::{Asked, Position};
use crate::ApiError;
use crate::server::{Context, path};
use crate::types::{Snapshot, SnapshotInfo, Template, TemplateKind};

/// The tag of what was given none.
const TAG: &str = "default";

pub(in crate::server) async fn list(
    context: Context,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let (mut sandbox, mut name, mut page) = (None, None, Asked::default());
    for (key, value) in form_urlencoded::parse(query.unwrap_or_default().as_bytes()) {
        match &*key {
            "sandboxID" => sandbox = Some(path::sandbox_id(&value).to_owned()),
            "name" => name = Some(value.into_owned()),
            _ => page.take(&key, &value)?,
        }
    }
    let templates = context.daemon.templates().await?;
    let wanted = templates.into_iter().filter(|template| {
        let of_sandbox = sandbox.is_none() || template.sandbox_id == sandbox;
        let called = |name: &String| is_called(template, name);
        template.kind == TemplateKind::Snapshot && of_sandbox && name.iter().all(called)
    });
    let items = wanted.map(|template| {
        let at = Position::new(template.created_at, &template.template_id);
        (at, shown(&template))
    });
    Ok(page.of(items.collect(), false))
}

/// Whether a snapshot goes by `name`, with or without its tag.
fn is_called(template: &Template, name: &str) -> bool {
    let name = name.rsplit_once('/').map_or(name, |(_, name)| name);
    let fits = |own: &String| tagged(own) == tagged(name);
    template.names.iter().any(fits)
}

fn tagged(name: &str) -> String {
    match name.contains(':') {
        true => name.to_owned(),
        false => format!("{name}:{TAG}"),
    }
}

/// Puts a snapshot that was taken into E2B's words.
pub(in crate::server) fn put(taken: &mut Snapshot) {
    let shown = shown(&taken.template);
    taken.snapshot_id = shown.snapshot_id;
    taken.names = shown.names;
}

/// A snapshot as E2B's clients know it.
fn shown(template: &Template) -> SnapshotInfo {
    SnapshotInfo {
        snapshot_id: tagged(&template.template_id),
        names: template.names.iter().map(|name| tagged(name)).collect(),
    }
}
