//! Flags about directories that were built with --tp.
use crate::runtime::Way;
use clap::Args;

/// Flags about ranks as processes.
#[derive(Debug, Default, Args)]
pub struct ProcessArgs {
    /// Where rank 0 listens, if mpirun, torchrun or srun started a process for each rank [default: MASTER_ADDR and
    /// MASTER_PORT, or on one machine a port of its own]
    #[arg(long, env = "TRTVLM_RENDEZVOUS", value_name = "HOST:PORT")]
    pub rendezvous: Option<String>,
}

/// Flags about the ranks of a directory that was built with --tp.
#[derive(Debug, Default, Args)]
pub struct RankArgs {
    /// The GPU of each rank, which several may have in common [default: one each, or all on the only one]
    #[arg(long, value_delimiter = ',', value_name = "GPU")]
    pub devices: Vec<usize>,
    /// What joins ranks on GPUs [default: local]
    #[arg(long, value_enum)]
    pub join: Option<Way>,
    /// Seconds that a rank waits for the others [default: 60; 600 on the reference in one process]
    #[arg(long, env = "TRTVLM_RANK_TIMEOUT", value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=86400))]
    pub rank_timeout: Option<u64>,
}
