//! Ranks that only meet.
use super::*;
use graphs::interpret::Member;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// A rank that only meets the others.
struct Meeting(Arc<Member>);

impl Meeting {
    fn meet(&self) -> Result<usize, RuntimeError> {
        Ok(self.0.all_gather(&[]).map_err(RuntimeError::Ranks)?.len())
    }
}

fn ranks(count: usize) -> Ranks<Meeting> {
    let seat = |member| {
        let member = Arc::new(member);
        let leaving = Arc::clone(&member);
        Seat { open: Box::new(|| Ok(Meeting(member))), leave: Box::new(move || leaving.leave()) }
    };
    Ranks::start(Group::members(count, ON_CPU).into_iter().map(seat).collect()).unwrap()
}

#[test]
fn all_do_the_same_until_one_fails_and_then_stop_at_once() {
    let ranks = ranks(3);
    assert_eq!(ranks.all(|rank| rank.meet()).unwrap(), [3, 3, 3]);
    let (start, number) = (Instant::now(), AtomicUsize::new(0));
    let work = move |rank: &mut Meeting| match number.fetch_add(1, Ordering::Relaxed) {
        2 => Err(RuntimeError::NoVision),
        _ => rank.meet(),
    };
    let error = ranks.all(work).unwrap_err();
    assert!(
        matches!(&error, RuntimeError::Rank { source, .. } if matches!(**source, RuntimeError::NoVision)),
        "{error:?}"
    );
    // And all that follows fails too.
    assert!(ranks.all(|rank| rank.meet()).is_err());
    drop(ranks);
    assert!(start.elapsed() < GRACE / 2, "{:?}", start.elapsed());
}

#[test]
fn a_panic_is_an_error_of_its_rank() {
    let (ranks, first) = (ranks(2), AtomicBool::new(true));
    let work = move |rank: &mut Meeting| {
        assert!(!first.swap(false, Ordering::Relaxed), "on purpose");
        rank.meet()
    };
    // The panic is told on standard error too; the other rank says the same of it.
    let error = ranks.all(work).unwrap_err().to_string();
    assert!(["rank 0 has stopped", "rank 1 has stopped"].contains(&error.as_str()), "{error}");
}

#[test]
fn what_all_refuse_is_said_once() {
    let error = ranks(2).all(|_| Err::<(), _>(RuntimeError::NoVision)).unwrap_err();
    assert!(matches!(error, RuntimeError::NoVision), "{error}");
}

#[test]
fn each_rank_has_its_gpu() {
    let at = |given: &[usize], way, found| {
        let placement = Placement { devices: given.to_vec(), way, patience: None };
        devices(2, &placement, found).map_err(|error| error.to_string())
    };
    assert_eq!(at(&[], None, 4), Ok(vec![0, 1]));
    assert_eq!(at(&[], None, 1), Ok(vec![0, 0]));
    assert_eq!(at(&[1, 0], None, 2), Ok(vec![1, 0]));
    let few = |found| Err(format!("the model has 2 ranks, there are {found} devices for them"));
    assert_eq!(at(&[], Some(Way::Nccl), 1), few(1));
    assert_eq!(at(&[0], None, 4), few(1));
}
