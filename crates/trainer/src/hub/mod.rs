//! Models by name: a folder on this disk, or a repository of the Hugging Face Hub, which is downloaded once.
//!
//! What is downloaded lies where `huggingface_hub` keeps it, in its form, so that Python's programs and this one share it:
//!
//! ```text
//! ~/.cache/huggingface/hub/models--OWNER--NAME/
//!   refs/main                      the commit that `main` was when last asked for
//!   blobs/<digest>                 each file once, by its SHA-256 (large files) or git's SHA-1 (small ones)
//!   snapshots/<commit>/vae/...     links into blobs
//! ```
//! The environment is that of `huggingface_hub`: `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_ENDPOINT`,
//! `HF_HUB_OFFLINE`; and that of all programs: `HTTPS_PROXY`, `NO_PROXY` and the like (`proxy`), `SSL_CERT_FILE`.

pub use self::files::Replaced;
pub use self::id::HubId;
pub use self::snapshot::folder_of;

mod api;
mod download;
mod files;
mod http;
mod id;
mod proxy;
mod snapshot;
mod source;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "test code")]
mod tests;
