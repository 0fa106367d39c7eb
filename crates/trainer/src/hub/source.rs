//! Where repositories come from, and where they are kept, by the environment.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use super::http::Route;
use super::proxy::Proxies;

/// Where repositories come from, and where they are kept. Not to be printed: it has the token.
#[derive(Clone)]
pub(crate) struct Hub {
    pub(super) endpoint: String,
    pub(super) token: Option<String>,
    pub(super) cache: PathBuf,
    pub(super) offline: bool,
    pub(super) route: Route,
    /// Before a connection that broke is tried again; doubled each time.
    pub(super) pause: Duration,
}

impl Hub {
    pub(super) fn from_env(offline: bool) -> Self {
        let set = |name: &str| env::var_os(name).filter(|value| !value.is_empty());
        let home = set("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let cache = set("XDG_CACHE_HOME").map(PathBuf::from);
            let cache = cache.or_else(|| Some(env::home_dir()?.join(".cache")));
            cache.unwrap_or_default().join("huggingface")
        });
        let text = |name: &str| set(name).and_then(|value| value.into_string().ok());
        let token = text("HF_TOKEN").or_else(|| {
            let path = set("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
            fs::read_to_string(path).ok()
        });
        let token = token.map(|token| token.trim().to_string());
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let is_on =
            |value: String| !["0", "false", "no", "off"].contains(&value.to_lowercase().as_str());
        Self {
            endpoint: endpoint.trim_end_matches('/').into(),
            token: token.filter(|token| !token.is_empty()),
            cache: set("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from),
            offline: offline || text("HF_HUB_OFFLINE").is_some_and(is_on),
            route: Route {
                proxies: Proxies::from_env(text),
                authorities: set("SSL_CERT_FILE").map(PathBuf::from),
            },
            pause: Duration::from_secs(1),
        }
    }
}
