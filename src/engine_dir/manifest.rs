//! `manifest.json`: what a directory holds, what made it, and the SHA-256 of every file in it.
use graphs::DType;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

pub const NAME: &str = "manifest.json";
pub const SCHEMA: u32 = 1;

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Manifest {
    pub schema: u32,
    /// Version of trtvlm.
    pub version: String,
    /// The model as it was named on the command line.
    pub model: String,
    pub model_type: String,
    pub dtype: DType,
    /// Quantization preset or recipe by sub-network; `none` where weights are plain.
    pub quantization: BTreeMap<String, String>,
    pub tp: usize,
    pub targets: BTreeMap<String, TargetEntry>,
    /// Sub-networks in the order in which they run.
    pub networks: Vec<String>,
    pub files: BTreeMap<String, FileEntry>,
    /// The command that builds this directory again.
    pub command: String,
    /// RFC 3339, UTC; the only value that differs between two builds of the same input.
    pub built_at: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetEntry {
    /// The library that built the engines, with its version; none for the reference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub library: Option<String>,
    /// GPUs that the engines run on.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gpus: Vec<String>,
    /// Name of the GPU that TensorRT tuned the engines on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub built_on: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    pub bytes: u64,
    pub sha256: String,
}

/// Now, or SOURCE_DATE_EPOCH where that is set, as RFC 3339 in UTC.
pub fn timestamp() -> String {
    let fixed = std::env::var("SOURCE_DATE_EPOCH").ok().and_then(|text| text.parse::<u64>().ok());
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    rfc3339(fixed.unwrap_or_else(now))
}

/// Days to a date by Howard Hinnant's `civil_from_days` (years count from March).
fn rfc3339(seconds: u64) -> String {
    let (days, second) = (seconds / 86400, seconds % 86400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::rfc3339;

    #[test]
    fn dates() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_827_696), "2000-02-29T12:34:56Z");
        assert_eq!(rfc3339(1_795_510_800), "2026-11-24T09:00:00Z");
    }
}
