//! Shell scripts in the place of a builder, for tests.
use super::EngineSpec;
use crate::engine_dir::SizeRequest;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// What a builder does that works.
pub(super) const DONE: &str = r#"printf plan > engine; echo '@trtvlm {"done":{"bytes":4,"sha256":"ab","library":"x","gpu":null,"seconds":1.0,"peak_resident_bytes":7}}'"#;

pub(super) struct Fake(tempfile::TempDir);

impl Fake {
    pub(super) fn new(script: &str) -> Fake {
        let fake = Fake(tempfile::tempdir().unwrap());
        std::fs::write(fake.program(), format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(fake.program(), std::fs::Permissions::from_mode(0o755)).unwrap();
        fake
    }

    pub(super) fn folder(&self) -> &Path {
        self.0.path()
    }

    pub(super) fn program(&self) -> PathBuf {
        self.folder().join("builder")
    }

    /// What to build, and an empty folder to work in.
    pub(super) fn engine(&self, name: &str) -> (EngineSpec, PathBuf) {
        let config = serde_json::json!({ "model_type": "llama", "max_position_embeddings": 64 });
        let facts = graphs::Model::from_config(&config).unwrap().facts();
        let spec = EngineSpec {
            name: "language".into(),
            label: "language".into(),
            network: "n".into(),
            library: "l".into(),
            gpus: vec![89],
            local: None,
            optimization_level: None,
            sizes: SizeRequest { max_batch_size: 1, ..SizeRequest::default() }.resolve(&facts).unwrap(),
            constants: Default::default(),
            engine: self.folder().join(format!("{name}.engine")),
        };
        let work = self.folder().join(format!("work-{name}"));
        std::fs::create_dir(&work).unwrap();
        (spec, work)
    }
}
