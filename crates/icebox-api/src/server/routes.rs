//! Every route, with what the document says of it.

use std::sync::LazyLock;

use bytes::Bytes;
use http::header::CONTENT_TYPE;
use serde_json::{Value, json};

use super::openapi::{self, Routes, delete, get, patch, post, put};
use super::{access, e2b, events, host, kernels, sandboxes, templates, vmms};
use crate::types::{
    AssignTags, AssignedTags, AuditEntry, AuditRange, BuildEvent, BuildStatus, ChangeLifetime,
    ChangeTeam, ChangeTemplate, ConnectRequest, DrainReport, Event, FilesUpload, Forked, GcReport,
    GcRequest, History, HostVmm, Kernel, KernelEvent, Key, Logs, MadeKey, MetricsRange,
    NetworkConfig, NewBuild, NewFork, NewKernel, NewKey, NewRecipe, NewSandbox, NewSnapshot,
    NewTeam, PauseRequest, RefreshRequest, RemoveTags, Report, RequestedBuild, ResumeRequest,
    RollbackRequest, SandboxDetail, SandboxMetric, Snapshot, SnapshotInfo, StartBuild, Stats, Team,
    Template, TemplateAlias, TemplateTag, VerbResult, Version, Warm,
};

/// What needs no key. [`super::front`] lets everybody in there, and nowhere else but where archives are put.
pub(super) const OPEN: [&str; 3] = ["/health", "/openapi.json", "/docs"];

/// All of them.
pub(super) fn all() -> Routes {
    let routes = sandboxes_of_e2b(of_sandboxes(Routes::default()));
    of_the_host(of_builds(of_templates(routes)))
}

fn of_sandboxes(routes: Routes) -> Routes {
    routes
        .add(
            get("/sandboxes", "All sandboxes, the newest first")
                .query::<sandboxes::Wanted>()
                .answers::<Vec<SandboxDetail>>(200),
            sandboxes::list,
        )
        .add(
            get("/sandboxes/{sandboxID}", "A sandbox")
                .query::<sandboxes::Wanted>()
                .answers::<SandboxDetail>(200),
            sandboxes::inspect,
        )
        .add(
            delete(
                "/sandboxes/{sandboxID}",
                "Removes a sandbox and all that it holds",
            )
            .nothing(204),
            sandboxes::destroy,
        )
        .add(
            post("/sandboxes/{sandboxID}/pause", "Pauses a sandbox")
                .options::<PauseRequest>()
                .nothing(204)
                .prefers::<VerbResult>(),
            sandboxes::pause,
        )
        .add(
            post("/sandboxes/{sandboxID}/resume", "Resumes a paused sandbox")
                .options::<ResumeRequest>()
                .answers::<SandboxDetail>(201)
                .prefers::<VerbResult>(),
            sandboxes::resume,
        )
        .add(
            post(
                "/sandboxes/{sandboxID}/stop",
                "Stops a sandbox: its disk is kept",
            )
            .answers::<VerbResult>(200),
            sandboxes::stop,
        )
        .add(
            post(
                "/sandboxes/{sandboxID}/start",
                "Boots the disk of a stopped sandbox",
            )
            .answers::<VerbResult>(200),
            sandboxes::start,
        )
        .add(
            post(
                "/sandboxes/{sandboxID}/checkpoints",
                "Makes a point to go back to",
            )
            .answers::<VerbResult>(200),
            sandboxes::checkpoint,
        )
        .add(
            post(
                "/sandboxes/{sandboxID}/rollback",
                "Goes back to a point of its history",
            )
            .body::<RollbackRequest>()
            .answers::<VerbResult>(200),
            sandboxes::rollback,
        )
        .add(
            get(
                "/sandboxes/{sandboxID}/history",
                "Every point to go back to, the oldest first",
            )
            .answers::<History>(200),
            sandboxes::history,
        )
        .add(
            delete("/sandboxes/{sandboxID}/history/{point}", "Removes a point").nothing(204),
            sandboxes::forget,
        )
        .add(
            post(
                "/sandboxes/{sandboxID}/snapshots",
                "Makes a template of this instant",
            )
            .options::<NewSnapshot>()
            .answers::<Snapshot>(201),
            sandboxes::snapshot,
        )
        .add(
            post(
                "/sandboxes/{sandboxID}/fork",
                "Makes running copies of this instant",
            )
            .options::<NewFork>()
            .answers::<Vec<Forked>>(201),
            sandboxes::fork,
        )
        .add(
            post(
                "/sandboxes/{sandboxID}/flatten",
                "Makes an image template of its disk",
            )
            .body::<NewSnapshot>()
            .answers::<Template>(201),
            sandboxes::flatten,
        )
        .add(
            post(
                "/sandboxes/{sandboxID}/timeout",
                "Changes when it ends, and when it begins to",
            )
            .body::<ChangeLifetime>()
            .nothing(204)
            .prefers::<SandboxDetail>(),
            sandboxes::set_lifetime,
        )
        .add(
            get(
                "/sandboxes/{sandboxID}/metrics",
                "What it used, the oldest first",
            )
            .query::<MetricsRange>()
            .answers::<Vec<SandboxMetric>>(200),
            sandboxes::metrics,
        )
        .add(
            get(
                "/sandboxes/{sandboxID}/console",
                "What its guest wrote to its console",
            )
            .content(),
            sandboxes::console,
        )
}

/// What only E2B's clients ask for.
fn sandboxes_of_e2b(routes: Routes) -> Routes {
    let logs = |path| {
        let any = || json!({"type": "string"});
        get(path, "What happened to it")
            .parameter(
                "cursor",
                "From here on, in ms since 1970.",
                json!({"type": "integer"}),
            )
            .parameter(
                "limit",
                "At most so many.",
                json!({"type": "integer", "minimum": 0, "maximum": 1000}),
            )
            .parameter(
                "direction",
                "Which way to read.",
                json!({"enum": ["forward", "backward"]}),
            )
            .parameter("level", "Only of this level.", any())
            .parameter("search", "Only with these words.", any())
            .answers::<Logs>(200)
    };
    routes
        .add(
            post(
                "/sandboxes",
                "Creates a sandbox, which runs for 15 s unless it says otherwise",
            )
            .options::<NewSandbox>()
            .answers::<SandboxDetail>(201),
            e2b::sandboxes::create_v1,
        )
        .add(
            post(
                "/v2/sandboxes",
                "Creates a sandbox, which runs for 300 s unless it says otherwise",
            )
            .options::<NewSandbox>()
            .answers::<SandboxDetail>(201),
            e2b::sandboxes::create,
        )
        .add(
            get(
                "/v2/sandboxes",
                "Those that run or are paused, the newest first, in pages",
            )
            .parameter(
                "metadata",
                "Labels that each has: a query, encoded.",
                json!({"type": "string"}),
            )
            .parameter(
                "state",
                "States, with commas between them.",
                json!({"enum": ["running", "paused", "running,paused"]}),
            )
            .parameter(
                "order",
                "By when they were created.",
                json!({"enum": ["asc", "desc"]}),
            )
            .parameter(
                "startedAfter",
                "Created after this.",
                json!({"type": "string", "format": "date-time"}),
            )
            .parameter("template", "Created from this.", json!({"type": "string"}))
            .pages()
            .answers::<Vec<SandboxDetail>>(200),
            e2b::list::list,
        )
        .add(
            post(
                "/sandboxes/{sandboxID}/connect",
                "Has it run for so long at least",
            )
            .body::<ConnectRequest>()
            .answers::<SandboxDetail>(200)
            .answers::<SandboxDetail>(201),
            e2b::sandboxes::connect_v1,
        )
        .add(
            post(
                "/v2/sandboxes/{sandboxID}/connect",
                "Has it run for so long at least",
            )
            .options::<ConnectRequest>()
            .answers::<SandboxDetail>(200)
            .answers::<SandboxDetail>(201),
            e2b::sandboxes::connect,
        )
        .add(
            post(
                "/sandboxes/{sandboxID}/refreshes",
                "Has it run for so long at least",
            )
            .options::<RefreshRequest>()
            .nothing(204),
            e2b::sandboxes::refresh,
        )
        .add(
            put(
                "/sandboxes/{sandboxID}/network",
                "Says what it may reach, which is as it was created",
            )
            .options::<NetworkConfig>()
            .nothing(204),
            e2b::sandboxes::network,
        )
        .add(logs("/sandboxes/{sandboxID}/logs"), e2b::sandboxes::logs)
        .add(logs("/v2/sandboxes/{sandboxID}/logs"), e2b::sandboxes::logs)
        .add(
            get(
                "/snapshots",
                "Templates that sandboxes were frozen into, the newest first, in pages",
            )
            .parameter("sandboxID", "Of this sandbox.", json!({"type": "string"}))
            .parameter("name", "Of this name.", json!({"type": "string"}))
            .pages()
            .answers::<Vec<SnapshotInfo>>(200),
            e2b::snapshots::list,
        )
}

fn of_templates(routes: Routes) -> Routes {
    routes
        .add(
            get("/templates", "All templates").answers::<Vec<Template>>(200),
            templates::list,
        )
        .add(
            get("/templates/{templateID}", "A template").answers::<Template>(200),
            templates::inspect,
        )
        .add(
            delete(
                "/templates/{templateID}",
                "Removes a template that nothing needs",
            )
            .nothing(204),
            templates::remove,
        )
        .add(
            patch(
                "/templates/{templateID}",
                "Says whether every team may use it",
            )
            .admins()
            .body::<ChangeTemplate>()
            .answers::<Template>(200),
            templates::change,
        )
        .add(
            put(
                "/templates/{templateID}/warm",
                "Has so many sandboxes made from it wait for who creates one",
            )
            .body::<Warm>()
            .answers::<Template>(200),
            templates::warm,
        )
        .add(
            get("/templates/aliases/{alias}", "What a name leads to").answers::<TemplateAlias>(200),
            templates::alias,
        )
        .add(
            post("/builds", "Builds a template; ends with its client")
                .body::<NewBuild>()
                .lines::<BuildEvent>(),
            templates::build,
        )
}

/// Templates that are built by steps.
fn of_builds(routes: Routes) -> Routes {
    use e2b::builds;
    routes
        .add(
            post(
                "/v3/templates",
                "Begins a build by steps, which waits for them",
            )
            .body::<NewRecipe>()
            .answers::<RequestedBuild>(202),
            builds::request,
        )
        .add(
            get(
                "/templates/{templateID}/files/{hash}",
                "Where an archive is to be put, unless it is there",
            )
            .answers::<FilesUpload>(201),
            builds::files,
        )
        .add(
            put(
                "/uploads/{way}",
                "Takes an archive from whoever was told the way",
            )
            .open()
            .bytes()
            .nothing(204),
            builds::put_files,
        )
        .add(
            post(
                "/v2/templates/{templateID}/builds/{buildID}",
                "Tells a build what to do",
            )
            .body::<StartBuild>()
            .nothing(202),
            builds::start,
        )
        .add(
            get(
                "/templates/{templateID}/builds/{buildID}/status",
                "How a build goes",
            )
            .query::<builds::Lines>()
            .answers::<BuildStatus>(200),
            builds::status,
        )
        .add(
            get("/templates/{templateID}/tags", "Its tags").answers::<Vec<TemplateTag>>(200),
            builds::tags,
        )
        .add(
            post("/templates/tags", "Gives tags to what another leads to")
                .body::<AssignTags>()
                .answers::<AssignedTags>(201),
            builds::assign_tags,
        )
        .add(
            delete("/templates/tags", "Takes tags away")
                .body::<RemoveTags>()
                .nothing(204),
            builds::remove_tags,
        )
}

fn of_the_host(routes: Routes) -> Routes {
    routes
        .add(
            get("/health", "Whether the daemon answers")
                .open()
                .nothing(204),
            host::health,
        )
        .add(
            get("/openapi.json", "This").open().answers::<Value>(200),
            document,
        )
        .add(
            get("/docs", "This, to read").open().page(),
            super::docs::page,
        )
        .add(
            get("/version", "Which daemon answers").answers::<Version>(200),
            host::version,
        )
        .add(
            get("/events", "What happens, as it does")
                .query::<events::Range>()
                .lines::<Event>(),
            events::events,
        )
        .add(
            get("/doctor", "What works on this host")
                .admins()
                .answers::<Report>(200),
            host::doctor,
        )
        .add(
            get("/stats", "What everything occupies")
                .admins()
                .answers::<Stats>(200),
            host::stats,
        )
        .add(
            post("/gc", "Removes what nothing needs")
                .admins()
                .options::<GcRequest>()
                .answers::<GcReport>(200),
            host::gc,
        )
        .add(
            post("/drain", "Pauses everything, and ends the daemon")
                .admins()
                .answers::<DrainReport>(200),
            host::drain,
        )
        .add(
            get("/vmms", "The VMMs that run sandboxes here").answers::<Vec<HostVmm>>(200),
            vmms::list,
        )
        .add(
            get("/kernels", "All kernels").answers::<Vec<Kernel>>(200),
            kernels::list,
        )
        .add(
            post("/kernels", "Imports a kernel; ends with its client")
                .admins()
                .body::<NewKernel>()
                .lines::<KernelEvent>(),
            kernels::import,
        )
        .add(
            get("/teams", "All teams")
                .admins()
                .answers::<Vec<Team>>(200),
            access::teams,
        )
        .add(
            post("/teams", "Makes a team")
                .admins()
                .body::<NewTeam>()
                .answers::<Team>(201),
            access::create_team,
        )
        .add(
            patch("/teams/{name}", "Changes what a team may have")
                .admins()
                .body::<ChangeTeam>()
                .answers::<Team>(200),
            access::change_team,
        )
        .add(
            delete("/teams/{name}", "Removes a team that has nothing")
                .admins()
                .nothing(204),
            access::remove_team,
        )
        .add(
            get("/api-keys", "All keys, without themselves")
                .admins()
                .answers::<Vec<Key>>(200),
            access::keys,
        )
        .add(
            post("/api-keys", "Makes a key, which is told this once")
                .admins()
                .body::<NewKey>()
                .answers::<MadeKey>(201),
            access::create_key,
        )
        .add(
            delete("/api-keys/{keyID}", "Removes a key")
                .admins()
                .nothing(204),
            access::remove_key,
        )
        .add(
            get("/audit", "What was changed by whom, the oldest first")
                .admins()
                .query::<AuditRange>()
                .answers::<Vec<AuditEntry>>(200),
            access::audit,
        )
}

/// The document. It is the same for everybody, so it is made once.
async fn document() -> ([(http::HeaderName, &'static str); 1], Bytes) {
    static DOCUMENT: LazyLock<Bytes> =
        LazyLock::new(|| openapi::document(&all().operations).to_string().into());
    ([(CONTENT_TYPE, "application/json")], DOCUMENT.clone())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::server::e2b::builds::UPLOADS;

    fn described() -> Value {
        openapi::document(&all().operations)
    }

    fn operations(document: &Value) -> impl Iterator<Item = (String, &Value)> {
        let paths = document["paths"].as_object().expect("paths");
        paths.iter().flat_map(|(path, methods)| {
            let methods = methods.as_object().expect("methods").iter();
            methods.map(move |(method, operation)| {
                let route = format!("{} {path}", method.to_uppercase());
                (route, operation)
            })
        })
    }

    /// Without what its variables are called.
    fn nameless(route: &str) -> String {
        let segments = route
            .split('/')
            .map(|it| if it.starts_with('{') { "{}" } else { it });
        segments.collect::<Vec<_>>().join("/")
    }

    #[test]
    fn the_document_and_the_page_about_it_have_the_same_routes() {
        let page = include_str!("../../../../docs/api.md");
        let first_cells = page
            .lines()
            .filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
        let written: BTreeSet<String> = first_cells
            .flat_map(|cell| cell.split('`').skip(1).step_by(2))
            .filter(|route| {
                route.contains(" /") && !route.contains("/ui/") && !route.ends_with("/test")
            })
            .map(|route| nameless(route.split('?').next().unwrap_or(route)))
            .collect();
        let document = described();
        let served: BTreeSet<String> = operations(&document).map(|(it, _)| nameless(&it)).collect();
        assert_eq!(written, served);
    }

    #[test]
    fn what_needs_no_key_is_what_the_front_door_lets_in() {
        let document = described();
        let open: BTreeSet<String> = operations(&document)
            .filter(|(_, operation)| operation["security"].is_array())
            .map(|(route, _)| route.split(' ').nth(1).unwrap_or_default().to_owned())
            .collect();
        let mut wanted: BTreeSet<String> = OPEN.map(ToOwned::to_owned).into();
        wanted.insert(format!("{UPLOADS}{{way}}"));
        assert_eq!(open, wanted);
    }

    #[test]
    fn every_reference_of_the_document_leads_somewhere_and_every_name_is_one_operations() {
        let document = described();
        let text = document.to_string();
        let references = text.split("\"$ref\":\"#").skip(1);
        let mut count = 0;
        for reference in references {
            let (pointer, _) = reference.split_once('"').expect("an end");
            assert!(document.pointer(pointer).is_some(), "{pointer}");
            count += 1;
        }
        assert!(count > 100, "{count} references");
        let names: Vec<_> = operations(&document)
            .map(|(_, it)| it["operationId"].to_string())
            .collect();
        let distinct: BTreeSet<_> = names.iter().collect();
        assert_eq!(names.len(), distinct.len(), "{names:?}");
    }
}
