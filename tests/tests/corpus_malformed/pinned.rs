//! A peer chooses in what company pages arrive, and must not choose by that how much memory they keep alive.

use backup::inbox::{Destination, Inbox, PageBatch};
use replication_proto::limits::MAX_INBOUND_BYTES;
use replication_proto::{ReceiverEvent, ReceiverLimits};

use crate::meter;
use crate::support::{self, Backup, Forge, INBOUND, PAGES, receiver_config};

const INBOX_LIMIT: usize = 1 << 20;
/// What the link reads at once.
const READ: usize = 256 << 10;

/// Single pages, each in a read of its own among frames that nobody keeps: what the inbox holds is about what it counts.
pub(crate) fn small_pages_among_large_frames() {
    let mut forge = Forge::primary();
    let limits =
        ReceiverLimits { max_epoch_pages: 1 << 20, max_epoch_section_bytes: 1 << 20, max_epoch_disk_bytes: 1 << 20 };
    let ram = replication_proto::RamLayout::new(vec![replication_proto::PageRange {
        first: replication_proto::PageIndex(0),
        pages: 1 << 12,
    }])
    .unwrap();
    let config = replication_proto::ReceiverConfig { limits, ram: ram.clone(), ..receiver_config() };
    let mut backup = Backup::new(config.clone());
    backup.memory.clear();
    let mut receiver = replication_proto::Receiver::new(config);
    let mut hello = support::hello_payload();
    hello.truncate(26);
    hello.extend(1u16.to_le_bytes());
    hello.extend([0u64, 1 << 12].map(u64::to_le_bytes).concat());
    hello.extend(&support::hello_payload()[60..]);
    receiver.handle_bytes(&forge.frame(support::HELLO, 0, &hello)).unwrap();
    assert!(matches!(receiver.poll_event(), Ok(Some(ReceiverEvent::Opened { .. }))));
    let mut inbox = Inbox::new(INBOX_LIMIT);
    let filler = vec![0; MAX_INBOUND_BYTES + 4];
    // A delta needs a base before it; the inbox alone does not.
    receiver.handle_bytes(&forge.begin(7, 0)).unwrap();
    inbox.begin(replication_proto::Epoch(7), replication_proto::CheckpointKind::Delta).unwrap();
    let used = meter::measure(|| {
        for page in 0..200u64 {
            let payload = support::pages_payload(0, &[(page, 1, 0)], 1, 4096, &support::page(1));
            let mut read = forge.frame(PAGES, 7, &payload);
            while read.len() + filler.len() + 80 < READ {
                read.extend(forge.frame(INBOUND, 7, &filler));
            }
            receiver.handle_bytes(&read).unwrap();
            while let Some(event) = receiver.poll_event().unwrap() {
                if let ReceiverEvent::Pages { indexes, bytes } = event {
                    assert_eq!(inbox.pages(PageBatch { indexes, bytes }).unwrap(), Destination::Kept);
                }
            }
        }
    });
    assert!(used.peak <= 4 * INBOX_LIMIT, "an inbox of {INBOX_LIMIT} bytes keeps {} bytes alive", used.peak);
}
