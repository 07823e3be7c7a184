// SPDX-License-Identifier: Apache-2.0

package blockcopy

import "time"

// SetSettleEvery returns what it was.
func SetSettleEvery(d time.Duration) time.Duration {
	was := settleEvery
	settleEvery = d
	return was
}
