//! What a run's bits depend on besides its configuration: binary, backend, device, CPU features.

use std::collections::BTreeMap;

use lora_core::files::digest::digest_file;
use lora_core::ops::{COMPOSITIONS, CUBE_KERNELS, KERNELS};
use serde::{Deserialize, Serialize};

use crate::device::NamedDevice;

/// Exact resume is promised where all of this is equal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fingerprint {
    /// SHA-256 of the program.
    pub binary: String,
    /// Version of flux-lora.
    pub version: String,
    /// Backend and device index.
    pub device: String,
    /// What the backend calls the hardware; the same kernels may be picked differently on another model.
    pub hardware: String,
    /// CPU features that kernels are chosen by at run time.
    pub cpu_features: String,
    /// The project's own operations; empty in a checkpoint from before they existed.
    #[serde(default)]
    pub kernels: String,
}

impl Fingerprint {
    /// Of this process, running on `device`.
    pub fn of(device: &NamedDevice) -> std::io::Result<Self> {
        Ok(Self {
            binary: digest_file(&std::env::current_exe()?)?,
            version: env!("CARGO_PKG_VERSION").into(),
            device: device.name.clone(),
            hardware: device.hardware.clone(),
            cpu_features: cpu_features(),
            kernels: match device.backend() {
                "flex" => KERNELS.into(),
                "wgpu" | "cuda" => CUBE_KERNELS.into(),
                _ => COMPOSITIONS.into(),
            },
        })
    }

    /// Name, stored and present value of everything that differs.
    pub fn differences(&self, present: &Self) -> Vec<(&'static str, String, String)> {
        let fields = |f: &Self| {
            [
                ("device", f.device.clone()),
                ("hardware", f.hardware.clone()),
                ("cpu_features", f.cpu_features.clone()),
                ("kernels", f.kernels.clone()),
                ("version", f.version.clone()),
                ("binary", f.binary.chars().take(12).collect()),
            ]
        };
        fields(self)
            .into_iter()
            .zip(fields(present))
            .filter(|(stored, present)| stored.1 != present.1)
            .map(|((name, stored), (_, present))| (name, stored, present))
            .collect()
    }
}

/// The features GEMM and elementwise kernels are dispatched on.
fn cpu_features() -> String {
    #[cfg(target_arch = "x86_64")]
    let features = BTreeMap::from([
        ("avx", std::is_x86_feature_detected!("avx")),
        ("avx2", std::is_x86_feature_detected!("avx2")),
        ("fma", std::is_x86_feature_detected!("fma")),
        ("avx512f", std::is_x86_feature_detected!("avx512f")),
        ("avx512bw", std::is_x86_feature_detected!("avx512bw")),
        ("avx512dq", std::is_x86_feature_detected!("avx512dq")),
        ("avx512vl", std::is_x86_feature_detected!("avx512vl")),
    ]);
    #[cfg(not(target_arch = "x86_64"))]
    let features: BTreeMap<&str, bool> = BTreeMap::new();
    let present: Vec<&str> = features
        .into_iter()
        .filter_map(|(name, present)| present.then_some(name))
        .collect();
    format!("{} {}", std::env::consts::ARCH, present.join(" "))
        .trim_end()
        .to_string()
}
