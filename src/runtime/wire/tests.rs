//! Ranks that are threads of the test, joined by TCP.
use super::rendezvous::call;
use super::*;
use std::io::Write;
use std::net::TcpListener;
use std::thread;

const PATIENCE: Duration = Duration::from_millis(400);
const START: Duration = Duration::from_secs(20);

fn worlds(size: usize) -> Vec<World> {
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    (0..size).map(|rank| World { rank, size, local_rank: rank, address: free.to_string() }).collect()
}

fn joined(size: usize, patience: Duration) -> Vec<Wire> {
    thread::scope(|scope| {
        let join = |world: World| scope.spawn(move || Wire::join(&world, b"same", patience, START).unwrap());
        let threads: Vec<_> = worlds(size).into_iter().map(join).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn sums_and_joins_many_times() {
    let wires = joined(3, START);
    thread::scope(|scope| {
        for (rank, wire) in wires.iter().enumerate() {
            scope.spawn(move || {
                let own = if rank == 0 { vec![7; 128] } else { Vec::new() };
                assert_eq!(wire.broadcast(own).unwrap(), vec![7; 128]);
                for round in 0..100 {
                    let mut values = [rank as f32, round as f32];
                    wire.all_reduce(&mut values).unwrap();
                    assert_eq!(values, [3.0, 3.0 * round as f32]);
                    let all = wire.all_gather(&[rank as f32 + round as f32]).unwrap();
                    assert_eq!(all, [0, 1, 2].map(|other| vec![(other + round) as f32]));
                }
                wire.finish();
            });
        }
    });
}

#[test]
fn whoever_leaves_is_named_to_all() {
    let mut wires = joined(3, START);
    let (sender, heard) = std::sync::mpsc::channel();
    wires[0].watch(move |reason| sender.send(reason.to_owned()).unwrap());
    let start = Instant::now();
    drop(wires.pop());
    thread::scope(|scope| {
        for wire in &wires {
            scope.spawn(|| assert_eq!(wire.all_gather(&[1.0]).unwrap_err(), "rank 2 has stopped"));
        }
    });
    assert_eq!(heard.recv_timeout(START).unwrap(), "rank 2 has stopped");
    assert!(start.elapsed() < START / 2, "{:?}", start.elapsed());
}

#[test]
fn slow_work_is_no_silence() {
    let wires = joined(2, PATIENCE);
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(PATIENCE * 3);
            wires[1].all_gather(&[1.0]).unwrap();
        });
        assert_eq!(wires[0].all_gather(&[0.0]).unwrap(), [[0.0], [1.0]]);
    });
}

/// A peer that joins and then says nothing, as a process that was stopped.
#[test]
fn silence_is_noticed() {
    let worlds = worlds(2);
    thread::scope(|scope| {
        let silent = scope.spawn(|| call(&worlds[1], b"same", START).unwrap());
        let wire = Wire::join(&worlds[0], b"same", PATIENCE, START).unwrap();
        let _silent = silent.join().unwrap();
        assert_eq!(wire.all_gather(&[1.0]).unwrap_err(), "rank 1 has said nothing for 400ms");
    });
}

#[test]
fn who_does_not_come_or_fit_is_named() {
    let worlds = worlds(3);
    let error = |world: &World, same: &[u8]| {
        let short = Duration::from_millis(300);
        Wire::join(world, same, short, short).err().unwrap().to_string()
    };
    let address = &worlds[0].address;
    assert_eq!(error(&worlds[0], b"a"), format!("ranks 1, 2 did not come to {address} within 300ms"));
    assert!(error(&worlds[1], b"a").starts_with(&format!("rank 0 did not answer at {address} within 300ms: ")));
    thread::scope(|scope| {
        let waiting = scope.spawn(|| Wire::join(&worlds[0], b"a", START, START).err().unwrap().to_string());
        // What is no rank is passed over.
        let stray = loop {
            if let Ok(mut stream) = TcpStream::connect(address) {
                stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
                break stream;
            }
        };
        let other = Wire::join(&worlds[2], b"b", START, START).err().unwrap().to_string();
        assert_eq!(other, "rank 2 runs another directory than rank 0");
        assert_eq!(waiting.join().unwrap(), other);
        drop(stray);
    });
}
