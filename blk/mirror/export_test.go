// SPDX-License-Identifier: Apache-2.0

package mirror

import "time"

func SetSettleEvery(d time.Duration) { settleEvery = d }

var ErrUnsure = errUnsure
