// SPDX-License-Identifier: Apache-2.0

package qcow2

// ReserveLittle makes reservations of clusters so small that there are many.
var ReserveLittle = reserveLittle
