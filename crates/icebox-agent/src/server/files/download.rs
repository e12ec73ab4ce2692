//! `GET /files`.

use std::{
    fs,
    io::{self, Read as _, Seek as _},
    path::Path,
    sync::Arc,
};

use axum::{
    body::Body,
    extract::{Query, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use bytes::Bytes;
use futures_util::stream;
use tokio::sync::mpsc;

use super::{
    Agent, CHUNK, FileQuery, HttpError, Operation, QUEUE, authorise, blocking, locate, owner,
    range::{self, Part},
    reopen, resolve,
};

/// Sends a file, or a part of it.
///
/// The length is never announced: files of `/proc` claim to have none, and any other may grow or shrink while it is
/// sent. What is sent is what is there, to the end; a failure half-way breaks the connection, so that nobody takes a
/// piece for the whole.
pub(in crate::server) async fn download(
    State(agent): State<Arc<Agent>>,
    Query(query): Query<FileQuery>,
    headers: HeaderMap,
) -> Result<Response, HttpError> {
    authorise(&agent, &headers, &query, Operation::Read)?;
    let user = owner(&agent, &headers, &query)?;
    let path = resolve(&agent, &user, query.path.as_deref().unwrap_or_default())?;
    let range = headers
        .get(header::RANGE)
        .and_then(|value| value.to_str().ok())
        .map(str::to_owned);

    let shown = path.clone();
    let (file, size) = blocking(move || {
        let failed = |error: io::Error| {
            HttpError::io(&format!("failed to read '{}'", path.display()), &error)
        };
        let file = reopen(&locate(&path)?, fs::OpenOptions::new().read(true)).map_err(failed)?;
        let size = file.metadata().map_err(failed)?.len();
        Ok((file, size))
    })
    .await?;

    // A size of nothing says nothing.
    let part = match range {
        Some(range) if size > 0 => range::parse(&range, size),
        _ => Part::Whole,
    };
    let mut answer = HeaderMap::new();
    answer.insert(
        header::CONTENT_TYPE,
        HeaderValue::from_static("application/octet-stream"),
    );
    answer.insert(header::ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    if let Some(disposition) = disposition(&shown) {
        answer.insert(header::CONTENT_DISPOSITION, disposition);
    }
    let content_range =
        |text: String| HeaderValue::try_from(text).map_err(|e| HttpError::internal(e.to_string()));
    match part {
        Part::Whole => Ok((answer, send(file, 0, None)).into_response()),
        Part::Bytes { first, last } => {
            answer.insert(
                header::CONTENT_RANGE,
                content_range(format!("bytes {first}-{last}/{size}"))?,
            );
            Ok((
                StatusCode::PARTIAL_CONTENT,
                answer,
                send(file, first, Some(last - first + 1)),
            )
                .into_response())
        }
        Part::Unsatisfiable => {
            answer.insert(
                header::CONTENT_RANGE,
                content_range(format!("bytes */{size}"))?,
            );
            Ok((StatusCode::RANGE_NOT_SATISFIABLE, answer).into_response())
        }
    }
}

/// Lets a browser save the file under its own name.
fn disposition(path: &Path) -> Option<HeaderValue> {
    let name = path.file_name()?.to_str()?;
    let plain = name
        .bytes()
        .all(|byte| byte.is_ascii_graphic() && byte != b'"' && byte != b'\\');
    HeaderValue::try_from(if plain {
        format!("inline; filename=\"{name}\"")
    } else {
        "inline".to_owned()
    })
    .ok()
}

/// Reads from `first` on, `length` bytes or to the end, on a thread of its own.
fn send(mut file: fs::File, first: u64, length: Option<u64>) -> Body {
    let (sender, receiver) = mpsc::channel::<io::Result<Bytes>>(QUEUE);
    tokio::task::spawn_blocking(move || {
        let result = (|| {
            if first > 0 {
                file.seek(io::SeekFrom::Start(first))?;
            }
            let mut left = length.unwrap_or(u64::MAX);
            while left > 0 {
                let mut chunk = Vec::with_capacity(CHUNK);
                let wanted = left.min(u64::try_from(CHUNK).unwrap_or(u64::MAX));
                let read = (&mut file).take(wanted).read_to_end(&mut chunk)?;
                if read == 0 || sender.blocking_send(Ok(chunk.into())).is_err() {
                    break;
                }
                left = left.saturating_sub(u64::try_from(read).unwrap_or(u64::MAX));
            }
            Ok(())
        })();
        if let Err(error) = result {
            // A reader that went away needs no error.
            sender.blocking_send(Err(error)).ok();
        }
    });
    Body::from_stream(stream::unfold(receiver, |mut receiver| async move {
        Some((receiver.recv().await?, receiver))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_break_out_of_its_header() {
        assert_eq!(
            disposition(Path::new("/a/b.txt")).unwrap(),
            "inline; filename=\"b.txt\""
        );
        for name in ["/a/\"b", "/a/b\\", "/a/b\r\nx: y", "/a/ä"] {
            assert_eq!(disposition(Path::new(name)).unwrap(), "inline");
        }
    }
}
