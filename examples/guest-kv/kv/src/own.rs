//! Commands that Redis does not have: they make the guest a good patient.

use crate::command::{Call, Done, Failure};

/// Room for the reply of FT.COUNTERS, in bytes.
const COUNTERS_ROOM: usize = 2048;

/// `FT.DIRTY pages-per-second [working-set-pages]`
pub(crate) fn dirty(call: &mut Call<'_>) -> Done {
    let rate = u64::try_from(call.integer(1)?).map_err(|_| Failure::NotInteger)?;
    let pages = match call.len() {
        3 => Some(u64::try_from(call.integer(2)?).ok().filter(|pages| *pages > 0).ok_or(Failure::NotInteger)?),
        _ => None,
    };
    call.machine.dirty(rate, pages)?;
    call.ok();
    Ok(())
}

/// `FT.WORK 0|1`
pub(crate) fn work(call: &mut Call<'_>) -> Done {
    let on = match call.integer(1)? {
        0 => false,
        1 => true,
        _ => return Err(Failure::NotInteger),
    };
    call.machine.work(on);
    call.ok();
    Ok(())
}

pub(crate) fn digest(call: &mut Call<'_>) -> Done {
    const HEX: &[u8; 16] = b"0123456789abcdef";
    let (digest, mut text) = (call.store.digest(), [0; 16]);
    for (byte, shift) in text.iter_mut().zip((0..16).rev()) {
        let nibble = usize::try_from((digest >> (4 * shift)) & 15).unwrap_or(0);
        *byte = HEX[nibble];
    }
    call.out.bulk(&text);
    Ok(())
}

pub(crate) fn uptime(call: &mut Call<'_>) -> Done {
    call.out.integer(i64::try_from(call.machine.uptime_ms()).unwrap_or(i64::MAX));
    Ok(())
}

pub(crate) fn counters(call: &mut Call<'_>) -> Done {
    let mut text = alloc::vec::Vec::new();
    text.try_reserve_exact(COUNTERS_ROOM).map_err(|_| Failure::OutOfMemory)?;
    call.machine.counters(&mut |name, value| {
        let number = crate::resp::Decimal::new(i64::try_from(value).unwrap_or(i64::MAX));
        for part in [name.as_bytes(), b":", number.as_bytes(), b"\r\n"] {
            if text.len() + part.len() <= COUNTERS_ROOM {
                text.extend_from_slice(part);
            }
        }
    });
    call.out.bulk(&text);
    Ok(())
}

pub(crate) fn power_off(call: &mut Call<'_>) -> Done {
    call.machine.power_off();
    call.ok();
    Ok(())
}

pub(crate) fn crash(call: &mut Call<'_>) -> Done {
    call.machine.crash();
    call.ok();
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::command::tests::Server;

    #[test]
    fn own_commands() {
        let mut server = Server::new();
        assert_eq!(server.ask("FT.DIRTY 1000 16"), "+OK|");
        assert_eq!(server.machine.dirty, Some((1000, Some(16))));
        assert_eq!(server.ask("FT.DIRTY 0"), "+OK|");
        assert_eq!(server.machine.dirty, Some((0, None)));
        assert!(server.ask("FT.DIRTY 1 1001").starts_with("-OOM"));
        for bad in ["FT.DIRTY -1", "FT.DIRTY x", "FT.DIRTY 1 0"] {
            assert!(server.ask(bad).starts_with("-ERR value"), "{bad}");
        }
        assert_eq!(server.ask("FT.WORK 1"), "+OK|");
        assert!(server.machine.works);
        assert!(server.ask("FT.WORK 2").starts_with("-ERR value") && server.machine.works);
        assert_eq!(server.ask("FT.WORK 0"), "+OK|");
        assert!(!server.machine.works);
        assert_eq!(server.ask("FT.UPTIME"), ":1234|");
        assert_eq!(server.ask("FT.COUNTERS"), "$10|frames:7||");
        assert_eq!(server.ask("FT.DIGEST"), "$16|0000000000000000|");
        server.ask("SET a b");
        assert_ne!(server.ask("FT.DIGEST"), "$16|0000000000000000|");
        server.ask("FT.POWEROFF");
        server.ask("FT.CRASH");
        assert!(server.machine.off && server.machine.crashed);
    }
}
