use thiserror::Error;

/// What is wrong with a network.
#[derive(Debug, Error, PartialEq)]
pub enum GraphError {
    #[error("`{path}` ({op}): {reason}")]
    Node { path: String, op: &'static str, reason: String },
    #[error("network `{name}`: {reason}")]
    Network { name: String, reason: String },
    #[error("network text, line {line}: {reason}")]
    Text { line: usize, reason: String },
    /// A value of the checkpoint's config.json.
    #[error("config.json: `{key}`: {reason}")]
    Config { key: String, reason: String },
}

impl GraphError {
    pub fn hint(&self) -> Option<String> {
        match self {
            GraphError::Config { .. } => Some("the config must be the one that belongs to the weights".into()),
            GraphError::Text { .. } => Some("the file was changed or written by another version; build again".into()),
            GraphError::Node { .. } | GraphError::Network { .. } => None,
        }
    }
}
