//! The bytes of files, up and down, in a stream: memory use does not depend on their size.

use std::{collections::BTreeMap, io};

use bytes::Bytes;
use futures_util::{Stream, TryStreamExt as _};
use http::{HeaderMap, HeaderName, HeaderValue, Method, header};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};

use super::{AgentClient, AgentError, connector::BoxError, error::failure_of, read_json};
use crate::{FILES_PATH, METADATA_HEADER_PREFIX, control::UploadedFile};

const READ: &str = "read a file of the sandbox";
const WRITE: &str = "write a file of the sandbox";

/// Where an upload goes and what is remembered about it.
#[derive(Clone, Debug, Default)]
pub struct Upload {
    /// Absolute, or relative to the user's home. Directories on the way are created.
    pub path: String,
    /// Replaces the file's metadata; names and values must be valid in HTTP headers.
    pub metadata: BTreeMap<String, String>,
}

/// A file on its way down.
pub struct FileReader {
    body: Incoming,
}

impl FileReader {
    /// The next piece, `None` at the end. A connection that breaks is an error, never an early end.
    ///
    /// # Errors
    /// When the connection breaks.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, AgentError> {
        while let Some(frame) = self.body.frame().await {
            let frame = frame.map_err(|source| AgentError::Unreachable {
                operation: READ,
                source: Box::new(source),
            })?;
            if let Ok(bytes) = frame.into_data() {
                return Ok(Some(bytes));
            }
        }
        Ok(None)
    }
}

impl AgentClient {
    /// Opens a file for reading.
    ///
    /// # Errors
    /// The status of [`AgentError::Refused`]: 404 missing, 400 a directory or a special file.
    pub async fn read_file(&self, path: &str) -> Result<FileReader, AgentError> {
        let response = self
            .send(READ, Method::GET, &files_uri(path), Bytes::new())
            .await?;
        if !response.status().is_success() {
            return Err(failure_of(READ, response).await);
        }
        Ok(FileReader {
            body: response.into_body(),
        })
    }

    /// Creates or overwrites a file with what `content` yields. A content that fails leaves what came before it.
    ///
    /// # Errors
    /// The status of [`AgentError::Refused`]: 400 a directory or a special file, 507 no space.
    pub async fn write_file(
        &self,
        upload: &Upload,
        content: impl Stream<Item = io::Result<Bytes>> + Send + 'static,
    ) -> Result<UploadedFile, AgentError> {
        let mut headers = HeaderMap::new();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/octet-stream"),
        );
        for (key, value) in &upload.metadata {
            let invalid = || AgentError::Protocol {
                operation: WRITE,
                message: format!("invalid metadata {key:?}"),
            };
            let name = HeaderName::try_from(format!("{METADATA_HEADER_PREFIX}{key}"))
                .map_err(|_| invalid())?;
            headers.insert(name, HeaderValue::try_from(value).map_err(|_| invalid())?);
        }
        let body = StreamBody::new(
            content
                .map_ok(Frame::data)
                .map_err(|error| Box::new(error) as BoxError),
        );
        let response = self
            .send_body(
                WRITE,
                Method::POST,
                &files_uri(&upload.path),
                headers,
                body.boxed_unsync(),
            )
            .await?;
        let mut files: Vec<UploadedFile> = read_json(WRITE, response).await?;
        files.pop().ok_or_else(|| AgentError::Protocol {
            operation: WRITE,
            message: "no file was written".to_owned(),
        })
    }
}

fn files_uri(path: &str) -> String {
    let mut uri = format!("{FILES_PATH}?path=");
    for byte in path.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'/' | b'-' | b'_' | b'.' | b'~' => {
                uri.push(char::from(byte));
            }
            _ => uri.push_str(&format!("%{byte:02X}")),
        }
    }
    uri
}
