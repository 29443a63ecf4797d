//! One process for each rank: which of them this one is, from what mpirun, torchrun and SLURM tell their processes.
use sha2::{Digest, Sha256};
use thiserror::Error;

#[derive(Debug, Error, PartialEq, Eq)]
pub enum LaunchError {
    #[error("`{name}` is `{found}`, wanted {wanted}")]
    Variable { name: &'static str, found: String, wanted: String },
    #[error("`{0}` is not set, though `{1}` is")]
    Missing(&'static str, &'static str),
    #[error("nothing says where rank 0 of {size} processes is")]
    NoAddress { size: usize },
    #[error("{size} processes were started for a directory of {ranks} ranks")]
    WrongSize { size: usize, ranks: usize },
}

impl LaunchError {
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            LaunchError::Variable { .. } | LaunchError::Missing(..) => {
                "mpirun, torchrun and srun set it; a single process needs none of these variables".into()
            }
            LaunchError::NoAddress { .. } => "set MASTER_ADDR and MASTER_PORT, or give --rendezvous HOST:PORT".into(),
            LaunchError::WrongSize { ranks: 1, .. } => "start one process".into(),
            LaunchError::WrongSize { ranks, .. } => format!("start {ranks} processes, or one for all ranks"),
        })
    }
}

/// The processes that were started together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    pub rank: usize,
    pub size: usize,
    /// The rank's place on its machine.
    pub local_rank: usize,
    /// `host:port` where rank 0 listens.
    pub address: String,
}

/// The variables of one launcher: rank, number of processes, place on the machine, processes on the machine.
struct Launcher {
    rank: &'static str,
    size: [&'static str; 2],
    local_rank: &'static str,
    local_size: &'static str,
    /// What must be set beside them, or they were not meant for this process.
    needs: Option<&'static str>,
    /// What tells one start from another.
    job: &'static [&'static str],
}

const LAUNCHERS: [Launcher; 4] = [
    Launcher {
        rank: "OMPI_COMM_WORLD_RANK",
        size: ["OMPI_COMM_WORLD_SIZE"; 2],
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_size: "OMPI_COMM_WORLD_LOCAL_SIZE",
        needs: None,
        job: &["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid", "OMPI_MCA_orte_ess_jobid"],
    },
    Launcher {
        rank: "PMI_RANK",
        size: ["PMI_SIZE"; 2],
        local_rank: "MPI_LOCALRANKID",
        local_size: "MPI_LOCALNRANKS",
        needs: None,
        job: &["HYDI_CONTROL_FD", "PMI_JOBID", "PMI_PORT"],
    },
    Launcher {
        rank: "RANK",
        size: ["WORLD_SIZE"; 2],
        local_rank: "LOCAL_RANK",
        local_size: "LOCAL_WORLD_SIZE",
        needs: None,
        job: &["TORCHELASTIC_RUN_ID"],
    },
    // A batch script is told the size of its job, too; what srun starts has a step.
    Launcher {
        rank: "SLURM_PROCID",
        size: ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"],
        local_rank: "SLURM_LOCALID",
        local_size: "SLURM_STEP_TASKS_PER_NODE",
        needs: Some("SLURM_STEP_ID"),
        job: &["SLURM_JOB_ID", "SLURM_STEP_ID"],
    },
];

/// Ports that are tried where nobody names one: below those that systems hand out by themselves.
const PORTS: std::ops::Range<u16> = 20000..32000;

impl World {
    /// What this process's environment says; nothing where it was started alone. `address` goes before what is found.
    ///
    /// # Errors
    /// Variables that contradict each other; nothing that says where rank 0 is.
    pub fn from_environment(address: Option<&str>) -> Result<Option<World>, LaunchError> {
        World::from_variables(&|name| std::env::var(name).ok().filter(|value| !value.is_empty()), address)
    }

    fn from_variables(
        get: &dyn Fn(&str) -> Option<String>,
        address: Option<&str>,
    ) -> Result<Option<World>, LaunchError> {
        let meant = |launcher: &&Launcher| {
            get(launcher.rank).is_some() && launcher.needs.is_none_or(|needed| get(needed).is_some())
        };
        let Some(launcher) = LAUNCHERS.iter().find(meant) else { return Ok(None) };
        let number = |name: &'static str| match get(name) {
            None => Ok(None),
            Some(text) => text.parse::<usize>().map(Some).map_err(|_| {
                let wanted = "a number".into();
                LaunchError::Variable { name, found: text, wanted }
            }),
        };
        let size_name = launcher.size.into_iter().find(|name| get(name).is_some());
        let size_name = size_name.ok_or(LaunchError::Missing(launcher.size[0], launcher.rank))?;
        let (rank, size) = (number(launcher.rank)?.unwrap_or(0), number(size_name)?.unwrap_or(0));
        if size == 1 && rank == 0 {
            return Ok(None);
        }
        if rank >= size {
            let (found, wanted) = (rank.to_string(), format!("less than the {size} of {size_name}"));
            return Err(LaunchError::Variable { name: launcher.rank, found, wanted });
        }
        let local_rank = number(launcher.local_rank)?.unwrap_or(rank);
        let address = match (address, get("MASTER_ADDR"), number("MASTER_PORT")?) {
            (Some(address), ..) => address.to_owned(),
            // torchrun itself listens at its port.
            (None, Some(host), Some(port)) => {
                let port = port + usize::from(get("TORCHELASTIC_RUN_ID").is_some());
                format!("{host}:{port}")
            }
            _ => at_home(get, launcher, size).ok_or(LaunchError::NoAddress { size })?,
        };
        Ok(Some(World { rank, size, local_rank, address }))
    }

    /// # Errors
    /// Another number of processes than a directory has ranks.
    pub fn check(&self, ranks: usize) -> Result<(), LaunchError> {
        match self.size == ranks {
            true => Ok(()),
            false => Err(LaunchError::WrongSize { size: self.size, ranks }),
        }
    }
}

/// Where all processes are on one machine: a port of it, by what tells this start from others.
fn at_home(get: &dyn Fn(&str) -> Option<String>, launcher: &Launcher, size: usize) -> Option<String> {
    let here: usize = get(launcher.local_size)?.parse().ok()?;
    let names: Vec<String> = launcher.job.iter().filter_map(|name| get(name)).collect();
    if here != size || names.is_empty() {
        return None;
    }
    let digest = Sha256::digest(names.join("/"));
    let number = digest.first().copied().unwrap_or(0) as u16 * 256 + digest.get(1).copied().unwrap_or(0) as u16;
    Some(format!("127.0.0.1:{}", PORTS.start + number % (PORTS.end - PORTS.start)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(variables: &[(&str, &str)], address: Option<&str>) -> Result<Option<World>, LaunchError> {
        let get = |name: &str| variables.iter().find(|(found, _)| *found == name).map(|(_, value)| (*value).to_owned());
        World::from_variables(&get, address)
    }

    fn of(rank: usize, size: usize, local_rank: usize, address: &str) -> Result<Option<World>, LaunchError> {
        Ok(Some(World { rank, size, local_rank, address: address.into() }))
    }

    #[test]
    fn each_launcher_is_understood() {
        assert_eq!(world(&[("HOME", "/root")], None), Ok(None));
        let torchrun = [
            ("RANK", "3"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_RANK", "1"),
            ("MASTER_ADDR", "node7"),
            ("MASTER_PORT", "29500"),
        ];
        assert_eq!(world(&torchrun, None), of(3, 8, 1, "node7:29500"));
        // Its agent has the port.
        assert_eq!(world(&[&torchrun[..], &[("TORCHELASTIC_RUN_ID", "a")]].concat(), None), of(3, 8, 1, "node7:29501"));
        assert_eq!(world(&torchrun, Some("node1:4000")), of(3, 8, 1, "node1:4000"));
        let slurm = [("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2"), ("SLURM_LOCALID", "0"), ("SLURM_STEP_ID", "0")];
        assert_eq!(world(&slurm, Some("node1:4000")), of(1, 2, 0, "node1:4000"));
        // In a batch script, which runs once.
        assert_eq!(world(&slurm[..3], None), Ok(None));
        // A step of one process within a job of several.
        assert_eq!(
            world(&[&slurm[1..], &[("SLURM_PROCID", "0"), ("SLURM_STEP_NUM_TASKS", "1")]].concat(), None),
            Ok(None)
        );
        let mpirun = |rank| {
            [
                ("OMPI_COMM_WORLD_RANK", rank),
                ("OMPI_COMM_WORLD_SIZE", "2"),
                ("OMPI_COMM_WORLD_LOCAL_RANK", rank),
                ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
                ("PMIX_NAMESPACE", "prterun-here-17@1"),
            ]
        };
        let [first, second] = ["0", "1"].map(|rank| world(&mpirun(rank), None).unwrap().unwrap());
        assert_eq!((first.rank, second.rank, second.local_rank), (0, 1, 1));
        assert!(first.address.starts_with("127.0.0.1:2") && first.address == second.address, "{first:?} {second:?}");
        assert_eq!(world(&[("PMI_RANK", "1"), ("PMI_SIZE", "4")], Some("a:1")), of(1, 4, 1, "a:1"));
        assert_eq!(world(&[("PMI_RANK", "0"), ("PMI_SIZE", "1")], None), Ok(None));
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let error = |variables: &[(&str, &str)]| world(variables, None).unwrap_err().to_string();
        assert_eq!(error(&[("RANK", "x"), ("WORLD_SIZE", "2")]), "`RANK` is `x`, wanted a number");
        assert_eq!(error(&[("RANK", "2"), ("WORLD_SIZE", "2")]), "`RANK` is `2`, wanted less than the 2 of WORLD_SIZE");
        assert_eq!(error(&[("RANK", "0")]), "`WORLD_SIZE` is not set, though `RANK` is");
        let nowhere = [("RANK", "0"), ("WORLD_SIZE", "2")];
        assert_eq!(error(&nowhere), "nothing says where rank 0 of 2 processes is");
        // Several machines.
        let apart = [
            ("OMPI_COMM_WORLD_RANK", "0"),
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_LOCAL_SIZE", "2"),
            ("PMIX_NAMESPACE", "a"),
        ];
        assert_eq!(error(&apart), "nothing says where rank 0 of 4 processes is");
        let pair = World { rank: 0, size: 2, local_rank: 0, address: "a:1".into() };
        assert_eq!(pair.check(4).unwrap_err().to_string(), "2 processes were started for a directory of 4 ranks");
        assert!(pair.check(2).is_ok());
    }
}
