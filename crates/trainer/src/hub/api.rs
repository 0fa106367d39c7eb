//! The small part of the Hub's API that downloading needs.

use std::io::Read;

use anyhow::Context;
use serde::Deserialize;

use super::http::{Response, get};
use super::id::HubId;
use super::source::Hub;

/// Lists of files are far shorter.
const LISTING_LIMIT: u64 = 32 << 20;

/// What a revision of a repository is.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Listing {
    /// The commit.
    #[serde(rename = "sha")]
    pub(crate) commit: String,
    /// Its files.
    #[serde(rename = "siblings")]
    pub(crate) files: Vec<HubFile>,
}

/// A file of a repository.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct HubFile {
    /// Path in the repository.
    #[serde(rename = "rfilename")]
    pub(crate) path: String,
    /// Bytes.
    pub(crate) size: Option<u64>,
    /// Git's name of it, a SHA-1; of a large file's pointer, if `lfs` is there.
    pub(crate) blob_id: Option<String>,
    /// A large file.
    pub(crate) lfs: Option<Lfs>,
}

/// What Git LFS knows of a file.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Lfs {
    pub(crate) sha256: String,
    pub(crate) size: u64,
}

/// Why the Hub did not answer as hoped.
#[derive(Debug)]
pub(crate) struct HubError {
    /// In a sentence, with what to do.
    pub(crate) message: String,
    /// Whether the network is at fault.
    pub(crate) unreachable: bool,
}

/// Asks for one repository.
#[derive(Clone, Copy)]
pub(crate) struct Client<'a> {
    pub(crate) hub: &'a Hub,
    pub(crate) id: &'a HubId,
}

impl Client<'_> {
    /// All files of the revision.
    pub(crate) fn listing(&self) -> Result<Listing, HubError> {
        let (endpoint, id) = (&self.hub.endpoint, self.id);
        let revision = id.revision.replace('/', "%2F");
        let url = format!(
            "{endpoint}/api/models/{}/revision/{revision}?blobs=true",
            id.repository
        );
        let answer = self.get(&url, 0).map_err(|error| HubError {
            message: format!(
                "{id} is no folder on this disk, and cannot be downloaded: {endpoint} cannot be reached ({error}); check the connection, or name a folder"
            ),
            unreachable: true,
        })?;
        if let Some(message) = self.refusal(&answer) {
            return Err(HubError {
                message,
                unreachable: answer.status >= 500,
            });
        }
        let mut bytes = Vec::new();
        let read = answer.body.take(LISTING_LIMIT).read_to_end(&mut bytes);
        let listing = read.map_err(anyhow::Error::from).and_then(|_| {
            let listing: Listing = serde_json::from_slice(&bytes)?;
            let is_hex = listing.commit.bytes().all(|byte| byte.is_ascii_hexdigit());
            anyhow::ensure!(
                is_hex && !listing.commit.is_empty(),
                "its commit is no commit"
            );
            Ok(listing)
        });
        listing.map_err(|error| HubError {
            message: format!(
                "{endpoint} does not answer like a Hub when asked for {id}: {error:#}"
            ),
            unreachable: false,
        })
    }

    /// The content of a file from byte `from` on.
    pub(crate) fn file(&self, commit: &str, path: &str, from: u64) -> anyhow::Result<Response> {
        let path: Vec<String> = path.split('/').map(escaped).collect();
        let (endpoint, repository) = (&self.hub.endpoint, &self.id.repository);
        let url = format!(
            "{endpoint}/{repository}/resolve/{commit}/{}",
            path.join("/")
        );
        self.get(&url, from).context("the connection broke")
    }

    fn get(&self, url: &str, from: u64) -> std::io::Result<Response> {
        get(&self.hub.route, url, self.hub.token.as_deref(), from)
    }

    /// What a status other than success means, and what to do.
    pub(crate) fn refusal(&self, answer: &Response) -> Option<String> {
        let (id, endpoint) = (self.id, &self.hub.endpoint);
        let code = answer.header("x-error-code");
        let has_token = self.hub.token.is_some();
        Some(match (answer.status, code) {
            (200..=299, _) => return None,
            (401 | 403, Some("GatedRepo")) if has_token => format!(
                "{id} is gated, and the account of your token has no access yet: accept its terms on {endpoint}/{}, and try again",
                id.repository
            ),
            (401 | 403, Some("GatedRepo")) => format!(
                "{id} is gated: accept its terms on {endpoint}/{}, make a token on {endpoint}/settings/tokens, and set HF_TOKEN to it (or run `hf auth login`)",
                id.repository
            ),
            (404, Some("RevisionNotFound")) => format!(
                "{} has no branch, tag or commit `{}`: leave out what is behind `@` for the newest",
                id.repository, id.revision
            ),
            (401, _) if has_token => format!(
                "{id} is no folder on this disk, and {endpoint} refuses the token in HF_TOKEN or the token file: make a new one, or take it away"
            ),
            (401 | 403 | 404, _) => format!(
                "{id} is no folder on this disk, and {endpoint} has no such repository, or it is private: check the spelling, or set HF_TOKEN to a token that may read it"
            ),
            (429, _) => format!(
                "{endpoint} is asked too often from here to give {id}: wait a while{}",
                if has_token { "" } else { ", or set HF_TOKEN" }
            ),
            (status, _) => {
                format!("{endpoint} answers {status} when asked for {id}: try again later")
            }
        })
    }
}

/// A path's segment as a URL has it.
fn escaped(segment: &str) -> String {
    let mut out = String::new();
    for byte in segment.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                out.push(byte.into())
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}
