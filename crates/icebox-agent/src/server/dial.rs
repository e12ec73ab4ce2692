//! The host's way to servers that listen on the guest's loopback address alone.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use axum::{
    extract::{Query, Request, State},
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use hyper_util::rt::TokioIo;
use icebox_agent_api::DIAL_PROTOCOL;
use serde::Deserialize;
use tokio::net::TcpStream;

use super::{
    auth::{presented_token, unauthorized},
    error::HttpError,
    state::Agent,
};

/// Where a server may listen that others do not reach.
const LOOPBACK: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
];

#[derive(Deserialize)]
pub(super) struct Wanted {
    port: u16,
}

/// Makes the connection one to a port of the loopback address, for as long as both sides keep it.
pub(super) async fn dial(
    State(agent): State<Arc<Agent>>,
    Query(wanted): Query<Wanted>,
    mut request: Request,
) -> Result<Response, HttpError> {
    if !agent.is_host(presented_token(request.headers())) {
        return Err(unauthorized());
    }
    let Some(mut server) = connect(wanted.port).await else {
        let message = format!("nobody listens on port {}", wanted.port);
        return Err(HttpError::new(StatusCode::BAD_GATEWAY, message));
    };
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        if let Ok(host) = upgraded.await {
            // Whichever side breaks, both know by the end of their connection.
            tokio::io::copy_bidirectional(&mut TokioIo::new(host), &mut server)
                .await
                .ok();
        }
    });
    let headers = [
        (header::CONNECTION, HeaderValue::from_static("upgrade")),
        (header::UPGRADE, HeaderValue::from_static(DIAL_PROTOCOL)),
    ];
    Ok((StatusCode::SWITCHING_PROTOCOLS, headers).into_response())
}

async fn connect(port: u16) -> Option<TcpStream> {
    for address in LOOPBACK {
        if let Ok(server) = TcpStream::connect((address, port)).await {
            // Latency before throughput, as on every connection of ours.
            server.set_nodelay(true).ok();
            return Some(server);
        }
    }
    None
}
