//! Orientation of a picture by its EXIF data.

/// Number of the tag.
const ORIENTATION: u16 = 0x0112;

/// Orientation, 1 to 8, from the content of a JPEG's APP1 segment; none if it states none.
pub fn orientation(segment: &[u8]) -> Option<u8> {
    let tiff = segment.strip_prefix(b"Exif\0\0")?;
    let big = match tiff.get(..4)? {
        [b'M', b'M', 0, 42] => true,
        [b'I', b'I', 42, 0] => false,
        _ => return None,
    };
    let short = |at: usize| {
        let bytes = tiff.get(at..at + 2)?.try_into().ok()?;
        Some(if big { u16::from_be_bytes(bytes) } else { u16::from_le_bytes(bytes) })
    };
    let [high, low] = [short(4)?, short(6)?].map(usize::from);
    let first = if big { high << 16 | low } else { low << 16 | high };
    let entries = usize::from(short(first)?);
    let entry = (0..entries).map(|number| first + 2 + 12 * number).find(|at| short(*at) == Some(ORIENTATION))?;
    short(entry + 8).and_then(|value| u8::try_from(value).ok()).filter(|value| (1..=8).contains(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_orientation_is_found_in_both_byte_orders() {
        let little = [&b"Exif\0\0II*\0\x08\0\0\0\x01\0"[..], &[0x12, 1, 3, 0, 1, 0, 0, 0, 6, 0, 0, 0]].concat();
        let big = [&b"Exif\0\0MM\0*\0\0\0\x08\0\x01"[..], &[1, 0x12, 0, 3, 0, 0, 0, 1, 0, 6, 0, 0]].concat();
        assert_eq!((orientation(&little), orientation(&big)), (Some(6), Some(6)));
        for cut in 0..little.len() - 2 {
            assert!(orientation(&little[..cut]).is_none_or(|found| found == 6));
        }
        assert_eq!(orientation(b"http://ns.adobe.com/xap/1.0/\0"), None);
    }
}
